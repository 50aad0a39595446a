"""`hf-sparse merge`: an adapter into the sparse weights, which stay sparse."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..command import Command
from ..failures import Failure
from ..models import (
    DeviceMap,
    Dtype,
    Model,
    Revision,
    check_dtype,
    load,
    looks_local,
    read_config,
    require_sparse,
)
from ..output import Output, Overwrite, check_output
from ..sections import DATA, METHOD

if TYPE_CHECKING:
    from hf_sparse import MergeReport


class Policy(StrEnum):
    """How values are found on the pattern."""

    masked = "masked"
    resolve = "resolve"


@dataclass(frozen=True)
class Merged:
    """What was done, and where the result is."""

    report: MergeReport
    output: Path

    def to_dict(self) -> dict[str, Any]:
        """The report's values, and where the checkpoint is."""
        return {**self.report.to_dict(), "output": str(self.output)}

    def __str__(self) -> str:
        return f"{self.report.summary()}\nsaved in {self.output}"


def merge(
    model: Model,
    adapter: Annotated[
        str, typer.Option(metavar="ADAPTER", help="Folder or Hub id of a PEFT adapter of MODEL.")
    ],
    output: Output,
    overwrite: Overwrite = False,
    policy: Annotated[
        Policy,
        typer.Option(
            help="masked: the merged values where MODEL has some; resolve: those on its pattern "
            "that come closest to the merged layer's outputs on the calibration data.",
            rich_help_panel=METHOD,
        ),
    ] = Policy.masked,
    refit: Annotated[
        int, typer.Option(help="Steps of the refit of resolve.", rich_help_panel=METHOD)
    ] = 20,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Calibration data, as for prune. resolve needs them; with masked they serve to "
            "measure alone.",
            rich_help_panel=DATA,
        ),
    ] = None,
    num_samples: Annotated[
        int, typer.Option(help="Number of calibration samples.", rich_help_panel=DATA)
    ] = 128,
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens a sample.  [default: 2048, or the model's limit]", rich_help_panel=DATA
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Samples per forward pass.", rich_help_panel=DATA)
    ] = 1,
    seed: Annotated[
        int, typer.Option(help="Decides which samples are drawn.", rich_help_panel=DATA)
    ] = 0,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> Merged:
    """Merge an adapter into a sparse checkpoint.

    It keeps its pattern to the last weight. Layers that are dense, and modules that the adapter
    saved whole, are merged as PEFT does it.
    """
    require_sparse(model, read_config(model, revision))
    check_output(output, overwrite, model, adapter)
    check_dtype(dtype)
    if policy is Policy.resolve and dataset is None:
        raise Failure("--policy resolve needs calibration data: pass --dataset")
    _check_adapter(adapter)
    from peft import PeftModel

    import hf_sparse
    from hf_sparse.calibration.sources import check_source
    from hf_sparse.checkpoint.folder import write_folder

    check_source(dataset)
    loaded, tokenizer = load(model, revision, dtype, device_map)
    merged = hf_sparse.merge_adapter(
        PeftModel.from_pretrained(loaded, adapter),
        policy.value,
        dataset=dataset,
        num_samples=num_samples,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        refit=refit,
    )
    parts = [part for part in (merged, tokenizer) if part is not None]
    write_folder(output, lambda folder: [part.save_pretrained(folder) for part in parts])
    return Merged(merged.merge_report, output)


def _check_adapter(adapter: str) -> None:
    """Raise a Failure if it is a folder without an adapter, or looks like one that isn't there."""
    folder = Path(adapter).expanduser()
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise Failure(f"the folder {adapter} has no adapter_config.json: it is no PEFT adapter")
    if not folder.is_dir() and (looks_local(adapter) or "/" not in adapter):
        raise Failure(f"there is no folder {adapter}, and an adapter's Hub id is like you/name")


COMMAND = Command(
    "merge",
    merge,
    (
        "hf-sparse merge opt-sparse --adapter opt-lora --output opt-merged",
        "hf-sparse merge opt-sparse --adapter opt-lora --policy resolve --dataset wikitext2 "
        "--output opt-merged",
    ),
)
