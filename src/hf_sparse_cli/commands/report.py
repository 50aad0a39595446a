"""`hf-sparse report`: a page about a sparse checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..command import Command
from ..failures import Failure
from ..models import (
    DATA_HELP,
    DeviceMap,
    Dtype,
    JoinDocuments,
    Model,
    Revision,
    Seed,
    Split,
    check_dtype,
    load,
    read_config,
    require_sparse,
)
from ..output import Overwrite, check_output_file
from ..sections import DATA, MEASUREMENTS, OUTPUT

if TYPE_CHECKING:
    from hf_sparse import Evaluation, PruningReport

PAGES = (".html", ".htm")
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
        lines += [self.report.advice(), f"written to {self.output}"]
        return "\n".join(line for line in lines if line)


def report(
    model: Model,
    output: Annotated[Path, typer.Option(help="The HTML file to write.", rich_help_panel=OUTPUT)],
    overwrite: Overwrite = False,
    dataset: Annotated[
        str | None,
        typer.Option(
            help=f"{DATA_HELP} Gives perplexity, and speed.", rich_help_panel=MEASUREMENTS
        ),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Measure this dense model as well, side by side.",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Generate text from this. May be repeated.  [default: from --dataset]",
            show_default=False,
            rich_help_panel=MEASUREMENTS,
        ),
    ] = None,
    split: Split = "test",
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a block.  [default: 2048, or the model's limit]", rich_help_panel=DATA
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Blocks to use at most.", rich_help_panel=DATA)
    ] = None,
    seed: Seed = 0,
    join_documents: JoinDocuments = False,
    masks: Annotated[
        bool,
        typer.Option("--masks/--no-masks", help="Show masks of layers.", rich_help_panel=OUTPUT),
    ] = True,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> Reported:
    """Make an HTML page about a sparse checkpoint.

    It shows what was pruned, how, and what that is worth. The page needs no network. It is made
    from the report that was saved with the checkpoint, and from its masks; the model is only loaded
    to measure it, with --dataset.
    """
    require_sparse(model, read_config(model, revision))
    if (dense or prompt) and not dataset:
        raise Failure(f"--{'dense' if dense else 'prompt'} measures: pass --dataset, too")
    if dense:
        read_config(dense, None)
    check_output_file(output, overwrite, PAGES)
    check_dtype(dtype)
    import hf_sparse
    from hf_sparse.calibration.sources import check_source
    from hf_sparse.calibration.tokenizers import find_tokenizer

    check_source(dataset)

    folder = _folder(model, revision)
    made = hf_sparse.PruningReport.from_folder(folder)
    if made is None:
        raise Failure(
            f"{model} has no pruning_report.json: it was not saved after `hf-sparse prune`, "
            "hf_sparse.prune or from_pretrained pruned it"
        )
    evaluation = None
    if dataset:
        evaluation = hf_sparse.evaluate(
            lambda: load(model, revision, dtype, device_map)[0],
            (lambda: load(dense, None, dtype, device_map)[0]) if dense else None,
            find_tokenizer(model, revision),
            dataset,
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
        "--dataset wikitext2 --num-samples 64",
    ),
    renamed={"--data": "--dataset"},
)
