"""The parameters that the files of an old sparse checkpoint hold.

Nothing here is trusted: shapes and dtypes are checked from the headers before a tensor is read,
contents right after. The parts of a weight may lie in different files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..header import read_header
from ..headers import LARGEST_SIDE
from .parameters import (
    BITMASK,
    BITMASK_24,
    PARTS,
    PackedParameter,
    PlainParameter,
    StoredParameter,
    StoredTensor,
)

# What only a weight in parts has; `shape` alone may be the end of any name.
_TELLING = ("compressed", "bitmask", "row_offsets")
_FLOATS = ("F64", "F32", "F16", "BF16")
_MOST_DIMENSIONS = 8


def read_parameters(files: Iterable[Path], structure: str) -> list[StoredParameter]:
    """All parameters of a checkpoint, from its files' headers, in the files' order.

    Args:
        files: the checkpoint's, see `weight_files`.
        structure: a key of PARTS.

    Raises:
        CheckpointError: a file can't be read, a tensor is there twice, a part is missing, or its
            shape or dtype is not what the others call for; names file and tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for key, listed in read_header(path).tensors.items():
            tensor = StoredTensor(str(path), key, listed.shape, listed.dtype, listed.bytes)
            if key in tensors:
                raise tensor.error(f"is in {tensors[key].file}, too")
            tensors[key] = tensor
    stems = {key.rpartition(".")[0] for key in tensors if key.rpartition(".")[2] in _TELLING}
    parameters: list[StoredParameter] = []
    for key, tensor in tensors.items():
        stem, _, part = key.rpartition(".")
        if stem not in stems or part not in (*_TELLING, "shape"):
            parameters.append(PlainParameter(tensor))
        else:
            found = {
                p: tensors[f"{stem}.{p}"] for p in PARTS[structure] if f"{stem}.{p}" in tensors
            }
            if part not in found:
                raise tensor.error(f"doesn't belong to format {structure!r}")
            if missing := [p for p in PARTS[structure] if p not in found]:
                raise tensor.error(f"is there, but {stem}.{missing[0]} is missing")
            if part == "compressed":
                parameters.append(_packed(stem, structure, found))
    return parameters


def _packed(stem: str, structure: str, parts: Mapping[str, StoredTensor]) -> PackedParameter:
    """One weight in parts, once its headers agree with the shape that it claims."""
    shape = _claimed_shape(parts["shape"], structure)
    compressed, bitmask = parts["compressed"], parts["bitmask"]
    if compressed.dtype not in _FLOATS:
        raise compressed.error(
            f"is {compressed.dtype}: quantised weights are not converted, expected "
            f"{' or '.join(_FLOATS)}"
        )
    bitmask.require((*shape[:-1], -(-shape[-1] // 8)), "U8")
    if structure == BITMASK:
        parts["row_offsets"].require(shape[:-1], "I64")
        compressed.require((math.prod(compressed.shape),), *_FLOATS)
    else:
        compressed.require((shape[0], shape[1] // 2), *_FLOATS)
        if math.prod(shape) % 4:
            raise parts["shape"].error(f"holds {list(shape)}, which is no whole number of fours")
    return PackedParameter(stem, structure, parts, shape)


def _claimed_shape(tensor: StoredTensor, structure: str) -> tuple[int, ...]:
    dimensions = tensor.shape[0] if tensor.shape else 0
    if structure == BITMASK_24:
        tensor.require((2, 1), "I64")
    elif not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise tensor.error(f"has shape {tensor.shape}, expected one number for each dimension")
    else:
        tensor.require((dimensions,), "I64")
    sides: list[Any] = tensor.read().flatten().tolist()
    if not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise tensor.error(f"holds {sides}, expected sides of 1 to {LARGEST_SIDE}")
    return tuple(sides)
