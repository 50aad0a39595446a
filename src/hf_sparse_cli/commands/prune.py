"""`hf-sparse prune`: from a dense model to a sparse checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..command import Command, Result
from ..failures import Failure, sentence
from ..models import (
    DeviceMap,
    Dtype,
    GgufFile,
    Model,
    Revision,
    check_dtype,
    load,
    require_dense,
)
from ..options import RENAMED_OPTIONS, ConfigFile, config_parameters, make_config
from ..output import Overwrite, check_output
from ..sections import OUTPUT, STREAMING

if TYPE_CHECKING:
    from hf_sparse import PruningReport, SparseConfig


@dataclass(frozen=True)
class Pruned:
    """What was made, and where it is."""

    report: PruningReport
    output: Path
    pushed: str | None

    def to_dict(self) -> dict[str, Any]:
        """The report's values, and where the checkpoint is."""
        return {**self.report.to_dict(), "output": str(self.output), "pushed": self.pushed}

    def __str__(self) -> str:
        pushed = f", pushed to {self.pushed}" if self.pushed else ""
        said = [self.report.summary(), self.report.advice(), f"saved in {self.output}{pushed}"]
        return "\n".join(line for line in said if line)


def prune(
    model: Model,
    settings: Mapping[str, Any],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write the checkpoint to. All but --dry-run need it.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Push the result to this Hub repository, too.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    private: Annotated[
        bool,
        typer.Option("--private", help="Make a new repository private.", rich_help_panel=OUTPUT),
    ] = False,
    push_revision: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH", help="Push to this branch of the repository.", rich_help_panel=OUTPUT
        ),
    ] = None,
    create_pr: Annotated[
        bool,
        typer.Option(
            "--create-pr",
            help="Push as a pull request, to any repository.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="From disk to disk, a block at a time, in this much memory, e.g. 8GB or 8GiB.",
            rich_help_panel=STREAMING,
        ),
    ] = None,
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(
            help="From disk to disk, and keep finished blocks here: if the run is broken off, the "
            "same command goes on from there.",
            rich_help_panel=STREAMING,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only tell what memory, disk and time a run from disk to disk would take.",
            rich_help_panel=STREAMING,
        ),
    ] = False,
) -> Result:
    """Prune a model and save it sparse.

    Its tokenizer or processor goes along. The folder appears complete or not at all. Whatever can
    be checked is checked before the model is loaded: the options, the output, the rights to push.
    """
    require_dense(model, revision, gguf_file)
    streamed = max_memory is not None or checkpoint_dir is not None or dry_run
    if streamed and (push_to_hub or gguf_file or device_map):
        raise Failure(
            "--max-memory, --checkpoint-dir and --dry-run are for runs from disk to disk, which "
            "take no --push-to-hub, --gguf-file or --device-map; `hf upload` pushes the result"
        )
    if output is not None:
        check_output(output, overwrite, model)
    elif not dry_run:
        raise typer.BadParameter("missing: where is the result to go?", param_hint="'--output'")
    if push_to_hub:
        check_push(push_to_hub, create_pr)
    sparse_config = make_config(settings, config)
    sparse_config.check_data()
    check_dtype(dtype)
    from hf_sparse.calibration.sources import check_source
    from hf_sparse.core.sizes import read_size

    check_source(sparse_config.dataset)
    if max_memory is not None:
        read_size("--max-memory", max_memory)

    if output is None or dry_run:
        from hf_sparse import estimate

        kept = checkpoint_dir is not None
        return estimate(model, sparse_config, revision=revision, dtype=dtype, resumable=kept)
    if streamed:
        options = {"max_memory": max_memory, "checkpoint_dir": checkpoint_dir}
        return _from_disk_to_disk(model, sparse_config, output, revision, dtype, options)
    from hf_sparse import prune as prune_loaded
    from hf_sparse.calibration.tokenizers import find_processor
    from hf_sparse.checkpoint.folder import write_folder
    from hf_sparse.publish.card import is_own_card

    processor = find_processor(model, revision, gguf_file)
    if gguf_file is None:
        pruned, _ = load(model, revision, dtype, device_map, quantization_config=sparse_config)
    else:  # transformers takes one quantization_config, and that is the file's
        pruned, _ = load(model, revision, dtype, device_map, gguf_file)
        own = {"tokenizer": processor} if sparse_config.tokenizer is None else {}
        prune_loaded(pruned, sparse_config.replaced(**own))
    parts = [part for part in (pruned, processor) if part is not None]
    _only_the_first_goes_on()
    write_folder(
        output, lambda folder: [part.save_pretrained(folder) for part in parts], is_own_card
    )
    if push_to_hub:
        try:
            pruned.push_to_hub(
                push_to_hub,
                private=private or None,
                revision=push_revision,
                create_pr=create_pr,
            )
        except Exception as error:
            raise Failure(
                f"saved in {output}, but not pushed, `hf upload {push_to_hub} {output}` tries "
                f"again: {sentence(error)}"
            ) from error
    return Pruned(pruned.hf_quantizer.report, output, push_to_hub)


def _from_disk_to_disk(
    model: str,
    config: SparseConfig,
    output: Path,
    revision: str | None,
    dtype: str,
    options: Mapping[str, Any],
) -> Pruned:
    from hf_sparse import estimate, prune_checkpoint
    from hf_sparse.core.processes import Processes

    if Processes.here().is_first:
        kept = options["checkpoint_dir"] is not None
        told = estimate(model, config, revision=revision, dtype=dtype, resumable=kept)
        typer.echo(told, err=True)
    report = prune_checkpoint(model, config, output, revision=revision, dtype=dtype, **options)
    _only_the_first_goes_on()
    return Pruned(report, output, None)


def _only_the_first_goes_on() -> None:
    """Of processes that a launcher started: the others have done their part."""
    from hf_sparse.core.processes import Processes

    if not Processes.here().is_first:
        raise typer.Exit


def check_push(repository: str, create_pr: bool) -> None:
    """Raise unless the token may write to a repository: pruning for hours must not be in vain.

    A pull request may be made to anyone's.
    """
    from huggingface_hub import HfApi

    user = HfApi().whoami()
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", ()))]
    owner = repository.rpartition("/")[0]
    if owner and owner not in owners and not create_pr:
        raise Failure(
            f"{repository} belongs to {owner}, and the token in use to {user['name']}, who can "
            f"push to {', '.join(f'{name}/...' for name in owners)}; --create-pr proposes a change"
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise Failure(f"the token in use may only read, and {repository} is to be written")


COMMAND = Command(
    "prune",
    prune,
    (
        "hf-sparse prune facebook/opt-125m --sparsity 0.5 --dataset wikitext2 --output out",
        "hf-sparse prune ./llama --pattern 2:4 --dataset text.txt --output out --push-to-hub me/x",
        "hf-sparse prune ./llama --method magnitude --sparsity '{\"mlp\": 0.6}' --output out",
        "hf-sparse prune ./llama --config sparse.yaml --seed 1 --output out --json > report.json",
        "hf-sparse prune ./llama-70b --dataset c4.txt --output out --max-memory 24GiB "
        "--checkpoint-dir run",
    ),
    generated=config_parameters(),
    renamed=RENAMED_OPTIONS,
)
