"""`hf-sparse report`: a page about a sparse checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..command import Command
from ..failures import Failure
from ..models import (
    DeviceMap,
    Dtype,
    JoinDocuments,
    Model,
    Revision,
    check_dtype,
    load,
    read_config,
    require_sparse,
)
from ..output import check_output_file

if TYPE_CHECKING:
    from hf_sparse import Evaluation, PruningReport

FILES = ("*.json", "*.safetensors")  # what a page is made from


@dataclass(frozen=True)
class Reported:
    """What the page shows, and where it is."""

    report: PruningReport
    evaluation: Evaluation | None
    output: Path

    def to_dict(self) -> dict[str, Any]:
        """The report's values, what was measured, and where the page is."""
        measured = self.evaluation.to_dict() if self.evaluation else None
        return {**self.report.to_dict(), "evaluation": measured, "output": str(self.output)}

    def __str__(self) -> str:
        lines = [self.report.summary()]
        if self.evaluation:
            measured = self.evaluation
            dense = (measured.dense_perplexity, measured.dense_speed)
            lines += [f"dense: {value}" for value in dense if value]
            sparse = (measured.perplexity, measured.agreement, measured.speed)
            lines += [str(value) for value in sparse if value]
        return "\n".join([*lines, f"written to {self.output}"])


def report(
    model: Model,
    output: Annotated[Path, typer.Option(help="The HTML file to write.")],
    dense: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Measure this dense model as well, side by side."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Measure perplexity on this, and speed: a text, JSON, csv or parquet file, or a "
            "Hub data set."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "test",
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a block.  [default: 2048, or the model's limit]")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Blocks to use at most.")] = None,
    seed: Annotated[int, typer.Option(help="Order of the documents of a file.")] = 0,
    join_documents: JoinDocuments = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Generate text from this. May be repeated.  [default: from --data]",
            show_default=False,
        ),
    ] = None,
    masks: Annotated[bool, typer.Option("--masks/--no-masks", help="Show masks of layers.")] = True,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> Reported:
    """Make one HTML page of a sparse checkpoint: what was pruned, how, and what it is worth.

    The page needs no network. It is made from the report that was saved with the checkpoint, and
    from its masks; the model is only loaded to measure it, with --data.
    """
    require_sparse(model, read_config(model, revision))
    if (dense or prompt) and not data:
        raise Failure(f"--{'dense' if dense else 'prompt'} measures: pass --data, too")
    if dense:
        read_config(dense, None)
    check_output_file(output)
    check_dtype(dtype)
    import hf_sparse
    from hf_sparse.calibration.tokenizers import find_tokenizer

    folder = _folder(model, revision)
    made = hf_sparse.PruningReport.from_folder(folder)
    if made is None:
        raise Failure(
            f"{model} has no pruning_report.json: it was not saved after `hf-sparse prune`, "
            "hf_sparse.prune or from_pretrained pruned it"
        )
    evaluation = None
    if data:
        evaluation = hf_sparse.evaluate(
            lambda: load(model, revision, dtype, device_map)[0],
            (lambda: load(dense, None, dtype, device_map)[0]) if dense else None,
            find_tokenizer(model, revision),
            data,
            seq_len=seq_len,
            num_samples=num_samples,
            seed=seed,
            split=split,
            join_documents=join_documents,
            prompts=prompt or (),
        )
    hf_sparse.write_report(made, output, masks=folder if masks else None, evaluation=evaluation)
    return Reported(made, evaluation, output)


def _folder(model: str, revision: str | None) -> Path:
    """Where the checkpoint's files are; those of a Hub id are fetched."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=[*FILES])
    )


COMMAND = Command(
    "report",
    report,
    (
        "hf-sparse report opt-sparse --output report.html",
        "hf-sparse report opt-sparse --output report.html --dense facebook/opt-125m "
        "--data wikitext2 --num-samples 64",
    ),
)
