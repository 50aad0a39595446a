"""`hf-sparse eval`: what a model is worth."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..command import Command
from ..failures import Failure
from ..models import (
    DATA_HELP,
    DeviceMap,
    Dtype,
    GgufFile,
    JoinDocuments,
    Model,
    Prefer,
    Revision,
    Seed,
    Split,
    load,
    read_dense_config,
)
from ..sections import DATA, MEASUREMENTS

if TYPE_CHECKING:
    from hf_sparse import Agreement, GenerationSpeed, Perplexity, TaskResults


@dataclass(frozen=True)
class Evaluation:
    """What was measured; None for what was not asked for."""

    model: str
    perplexity: Perplexity | None
    dense_perplexity: Perplexity | None
    agreement: Agreement | None
    speed: GenerationSpeed | None
    tasks: TaskResults | None

    def _measured(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """What was measured, as JSON values."""
        results = {name: value.to_dict() for name, value in self._measured().items()}
        return {"model": self.model, **results}

    def __str__(self) -> str:
        dense = {"dense_perplexity": "dense: "}
        return "\n".join(f"{dense.get(k, '')}{value}" for k, value in self._measured().items())


def evaluate(
    model: Model,
    dataset: Annotated[
        str | None,
        typer.Option(help=f"{DATA_HELP} Gives perplexity.", rich_help_panel=MEASUREMENTS),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compare with this dense model: perplexity, KL divergence, top-1 agreement.",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = None,
    dense_gguf_file: Annotated[
        str | None,
        typer.Option(
            help="The GGUF file of the model of --dense.",
            metavar="NAME",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = None,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed",
            help="Time generation, and report its peak memory.",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, separated by commas.", rich_help_panel=MEASUREMENTS),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="A folder with lm-eval tasks of your own.", rich_help_panel=MEASUREMENTS),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="Examples in the prompt of a task.", rich_help_panel=MEASUREMENTS),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Samples of a task at most.", rich_help_panel=MEASUREMENTS)
    ] = None,
    split: Split = "test",
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a window.  [default: 2048, or the model's limit]", rich_help_panel=DATA
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Sliding windows, this many tokens apart, not blocks.", rich_help_panel=DATA
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Windows to use at most.", rich_help_panel=DATA)
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Sequences per forward pass.", rich_help_panel=DATA)
    ] = 1,
    seed: Seed = 0,
    join_documents: JoinDocuments = False,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    prefer: Prefer = None,
) -> Evaluation:
    """Measure perplexity, agreement, speed, or tasks.

    Agreement is that with the dense model, tasks are those of lm-eval. The model may be sparse or
    dense.
    """
    if not (dataset or speed or tasks):
        raise Failure("nothing to measure: pass --dataset, --speed or --tasks")
    if dense_gguf_file and not dense:
        raise Failure("--dense-gguf-file names a file of the model of --dense: pass that, too")
    if dense and not dataset:
        raise Failure("--dense compares on text: pass --dataset, too")
    read_dense_config(model, revision, gguf_file)
    if dense:
        read_dense_config(dense, None, dense_gguf_file)
    import hf_sparse
    from hf_sparse.calibration.sources import check_source

    check_source(dataset)
    loaded, tokenizer = load(model, revision, dtype, device_map, gguf_file, prefer)
    text: dict[str, Any] = {
        "dataset": dataset,
        "seq_len": seq_len,
        "num_samples": num_samples,
        "batch_size": batch_size,
        "seed": seed,
        "split": split,
        "join_documents": join_documents,
    }
    measured = hf_sparse.perplexity(loaded, tokenizer, stride=stride, **text) if dataset else None
    # Before a dense model joins it in memory.
    timed = hf_sparse.generation_speed(loaded) if speed else None
    dense_measured = agreed = None
    if dense:
        other, _ = load(dense, None, dtype, device_map, dense_gguf_file)
        dense_measured = hf_sparse.perplexity(other, tokenizer, stride=stride, **text)
        agreed = hf_sparse.agreement(loaded, other, tokenizer, **text)
    done = None
    if tasks:
        done = hf_sparse.evaluate_tasks(
            loaded,
            tokenizer,
            tasks.split(","),
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
        )
    return Evaluation(model, measured, dense_measured, agreed, timed, done)


COMMAND = Command(
    "eval",
    evaluate,
    (
        "hf-sparse eval opt-sparse --dataset wikitext2 --dense facebook/opt-125m",
        "hf-sparse eval opt-sparse --dataset held-out.txt --seq-len 512 --stride 256 --speed",
        "hf-sparse eval opt-sparse --tasks arc_easy,hellaswag --limit 100 --json",
    ),
    renamed={"--data": "--dataset"},
)
