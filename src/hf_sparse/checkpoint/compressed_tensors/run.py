"""A conversion from end to end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import CheckpointError, SaveError
from ...core.sizes import read_size
from ..folder import write_folder
from ..skeleton import empty_model
from ..weight_files import INDEX, SINGLE, weight_files
from .files import read_parameters
from .plan import Number, plan
from .source import old_format, read_config, without_storage
from .write import copy_others, write_config, write_weights


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        layers: the format of each layer that is packed now, by name.
        dense: number of parameters that are stored dense.
        bytes_before: of the source's safetensors files.
        bytes_after: of the target's.
    """

    layers: Mapping[str, str]
    dense: int
    bytes_before: int
    bytes_after: int


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    max_shard_size: int | str = "5GB",
) -> Conversion:
    """Convert a checkpoint that compressed-tensors before 0.15 wrote sparse.

    Reads its formats `sparse-bitmask` and `sparse-24-bitmask`, which later versions can't. Weights
    keep their dtype and every bit but the sign of zeros. The linear layers that method "keep"
    would pack are packed, in the smallest format; all else is stored dense. The tokenizer and the
    other files are copied as they are, weights in other forms and hidden files left out.

    Args:
        source: the checkpoint's folder.
        target: folder; created if it isn't there. Appears complete or not at all.
        max_shard_size: of a safetensors file: bytes, or a text like "5GB" or "5GiB"; no more than
            that and the layer at work is in memory.

    Raises:
        CheckpointError: the source is in another format, damaged, or of a model that this version
            of transformers doesn't know, or stores differently; names file and tensor.
        ConfigError: max_shard_size is no size.
        SaveError: writing failed; what was there before is as it was.
    """
    folder, limit = Path(source), read_size("max_shard_size", max_shard_size)
    if folder.resolve() in (Path(target).resolve(), *Path(target).resolve().parents):
        raise SaveError(f"can't save to {str(target)!r}: it is in the source, pass another folder")
    config = read_config(folder)
    structure = old_format(config, str(folder))
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")
    parameters = read_parameters(files, structure)
    items = plan(folder, empty_model(without_storage(config), folder), parameters)

    def write(staging: str) -> None:
        copy_others(folder, Path(staging))
        write_config(config, Path(staging))
        write_weights(items, Path(staging), limit)

    write_folder(target, write, keep=lambda path: path.name == "README.md")
    layers = {item.layer.name: item.layer.format.label for item in items if item.layer}
    after = weight_files(Path(target))
    dense = sum(not (item.layer or isinstance(item.parameter, Number)) for item in items)
    return Conversion(layers, dense, _size(files), _size(after))


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)
