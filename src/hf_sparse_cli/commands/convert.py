"""`hf-sparse convert`: sparse checkpoints of old compressed-tensors, in this project's format."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..command import Command
from ..failures import Failure, sentence
from ..models import Model, Revision, read_config
from ..output import Output, Overwrite, check_output
from ..sections import OUTPUT

if TYPE_CHECKING:
    from hf_sparse import Conversion

# Weights in other forms: not even fetched.
UNUSED = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx")


@dataclass(frozen=True)
class Converted:
    """What was made, and where it is."""

    conversion: Conversion
    output: str

    def to_dict(self) -> dict[str, Any]:
        """The conversion's values, and where the checkpoint is."""
        return {**asdict(self.conversion), "output": self.output}

    def __str__(self) -> str:
        made, counts = self.conversion, Counter(self.conversion.layers.values())
        formats = ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
        return (
            f"{len(made.layers)} layers packed ({formats}), {made.dense} parameters dense; "
            f"{made.bytes_before / 1e6:.2f} MB before, {made.bytes_after / 1e6:.2f} MB in "
            f"{self.output}"
        )


def convert(
    model: Model,
    output: Output,
    max_shard_size: Annotated[
        str,
        typer.Option(
            help="Of a file; no more than a file is held in memory.", rich_help_panel=OUTPUT
        ),
    ] = "5GB",
    overwrite: Overwrite = False,
    revision: Revision = None,
) -> Converted:
    """Convert a checkpoint of old compressed-tensors.

    Versions before 0.15 wrote sparse ones. Reads its formats sparse-bitmask and sparse-24-bitmask,
    layer by layer and bit for bit. The folder, with tokenizer and other files, appears complete or
    not at all.
    """
    config = read_config(model, revision)
    check_output(output, overwrite, model)
    import hf_sparse
    from hf_sparse.checkpoint.compressed_tensors.source import old_format
    from hf_sparse.core.sizes import read_size

    old_format(config, model)  # before anything large is fetched
    read_size("--max-shard-size", max_shard_size)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _download(model, revision)
    return Converted(hf_sparse.convert(folder, output, max_shard_size), str(output))


def _download(model: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(model, revision=revision, ignore_patterns=[*UNUSED])
        )
    except (OSError, ValueError) as error:
        raise Failure(f"{model} can't be fetched from the Hub: {sentence(error)}") from error


COMMAND = Command(
    "convert",
    convert,
    (
        "hf-sparse convert ./llama-sparse-bitmask --output llama-sparse",
        "hf-sparse convert someone/Llama-2of4 --output llama-sparse --max-shard-size 2GB",
    ),
)
