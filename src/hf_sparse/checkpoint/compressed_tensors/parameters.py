"""What the sparse checkpoints hold that compressed-tensors wrote before its version 0.15.

A weight is stored in parts, under its own name (versions up to 0.8, which store every parameter
so) or under its module's (from 0.9 on, chosen modules only). With w its shape:

    sparse-bitmask      compressed   (kept,)                        values, row after row
                        bitmask      (*w[:-1], ceil(w[-1] / 8))     uint8, lowest bit first
                        row_offsets  w[:-1]                         int64, values in earlier rows
                        shape        (dimensions,)                  int64, w
    sparse-24-bitmask   compressed   (out, in / 2)                  2 values of each 4 weights
                        bitmask      (out, ceil(in / 8))            groups of 4 in memory order,
                        shape        (2, 1)                         which may run across rows
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...core.bits import padding_is_zero, unpack_bits
from ...core.errors import CheckpointError
from ..header import HeaderTensor

BITMASK, BITMASK_24 = "sparse-bitmask", "sparse-24-bitmask"
PARTS = {
    BITMASK: ("compressed", "bitmask", "row_offsets", "shape"),
    BITMASK_24: ("compressed", "bitmask", "shape"),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, as the header lists it; `dtype` is safetensors' name."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int

    def read(self) -> Tensor:
        """The tensor, through a mapping of the file that ends when the tensor does."""
        try:
            with safe_open(self.file, framework="pt") as file:
                tensor: Tensor = file.get_tensor(self.key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file}: it can't be read: {error}") from None
        return tensor

    def error(self, what: str) -> CheckpointError:
        """The error that names file and tensor."""
        return CheckpointError(f"{self.file}: {self.key} {what}")

    def require(self, shape: tuple[int, ...], *dtypes: str) -> None:
        """Raise a CheckpointError unless shape and dtype are what they must be."""
        if self.shape != shape or self.dtype not in dtypes:
            raise self.error(
                f"is {self.dtype} of shape {self.shape}, expected {' or '.join(dtypes)} of {shape}"
            )


@dataclass(frozen=True)
class PlainParameter:
    """A parameter, or buffer, that is stored as it is."""

    tensor: StoredTensor

    @property
    def names(self) -> tuple[str, ...]:
        """What its name may be."""
        return (self.tensor.key,)

    @property
    def origin(self) -> StoredTensor:
        """The tensor that an error about it names."""
        return self.tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dense shape."""
        return self.tensor.shape

    @property
    def bytes(self) -> int:
        """What it takes in its file."""
        return self.tensor.bytes

    @property
    def dense_bytes(self) -> int:
        """What it takes as an ordinary tensor."""
        return self.tensor.bytes

    @property
    def sparse(self) -> bool:
        """Is it, or a part of it, stored in parts?"""
        return False

    def dense(self) -> Tensor:
        """Its value."""
        return self.tensor.read()


@dataclass(frozen=True)
class PackedParameter:
    """A parameter that is stored in parts; its headers agree with its shape.

    Attributes:
        stem: what the names of its parts have in common.
        structure: BITMASK or BITMASK_24.
        parts: by their last name.
        shape: the dense shape.
    """

    stem: str
    structure: str
    parts: Mapping[str, StoredTensor]
    shape: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What its name may be: the stem is a parameter's up to 0.8, from 0.9 on a module's."""
        return (self.stem, f"{self.stem}.weight")

    @property
    def origin(self) -> StoredTensor:
        """The tensor that an error about it names."""
        return self.parts["compressed"]

    @property
    def bytes(self) -> int:
        """What its parts take."""
        return sum(part.bytes for part in self.parts.values())

    @property
    def dense_bytes(self) -> int:
        """What it takes as an ordinary tensor."""
        return HeaderTensor(self.shape, self.origin.dtype).bytes

    @property
    def sparse(self) -> bool:
        """Is it, or a part of it, stored in parts?"""
        return True

    def dense(self) -> Tensor:
        """Its value, of the dtype that it is stored in.

        Raises:
            CheckpointError: the contents of its parts contradict each other.
        """
        rows, columns = math.prod(self.shape[:-1]), self.shape[-1]
        packed = self.parts["bitmask"].read().view(rows, -1)
        if not padding_is_zero(packed, columns):
            raise self.parts["bitmask"].error(f"has bits set behind column {columns}")
        mask = unpack_bits(packed, columns)
        kept = mask.sum(dim=1)
        values = self.origin.read().flatten()
        if int(kept.sum()) != values.numel():
            raise self.parts["bitmask"].error(
                f"marks {int(kept.sum())} kept weights, but {self.origin.key} holds "
                f"{values.numel()}"
            )
        if self.structure == BITMASK:
            self._check_offsets(kept)
        elif bool((mask.view(-1, 4).sum(dim=1) != 2).any()):
            raise self.parts["bitmask"].error("doesn't keep 2 of every 4 weights")
        dense = values.new_zeros(mask.shape).masked_scatter_(mask, values)
        return dense.view(self.shape)

    def _check_offsets(self, kept: Tensor) -> None:
        offsets = self.parts["row_offsets"].read().flatten()
        if not torch.equal(offsets, kept.cumsum(dim=0) - kept):
            raise self.parts["row_offsets"].error(
                f"doesn't count what {self.parts['bitmask'].key} marks before each row"
            )


@dataclass(frozen=True)
class MergedParameter:
    """A parameter of which the checkpoint has the rows, or the experts, each on its own.

    Attributes:
        parts: in their order.
        stacked: are the parts the elements of a first dimension, or runs of the rows?
    """

    parts: Sequence[Parameter]
    stacked: bool

    def __post_init__(self) -> None:
        first = self.parts[0]
        for part in self.parts[1:]:
            same = part.shape[1:] == first.shape[1:] and part.origin.dtype == first.origin.dtype
            if not same or (self.stacked and part.shape != first.shape):
                raise part.origin.error(
                    f"is {part.origin.dtype} of a weight of shape {part.shape}, which doesn't fit "
                    f"{first.origin.key}, {first.origin.dtype} of {first.shape}: both are parts of "
                    "one weight"
                )

    @property
    def origin(self) -> StoredTensor:
        """The tensor that an error about it names."""
        return self.parts[0].origin

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dense shape."""
        first = self.parts[0].shape
        if self.stacked:
            return (len(self.parts), *first)
        return (sum(part.shape[0] for part in self.parts), *first[1:])

    @property
    def bytes(self) -> int:
        """What its parts take."""
        return sum(part.bytes for part in self.parts)

    @property
    def dense_bytes(self) -> int:
        """What it takes as an ordinary tensor."""
        return sum(part.dense_bytes for part in self.parts)

    @property
    def sparse(self) -> bool:
        """Is it, or a part of it, stored in parts?"""
        return any(part.sparse for part in self.parts)

    def dense(self) -> Tensor:
        """Its value."""
        values = [part.dense() for part in self.parts]
        return torch.stack(values) if self.stacked else torch.cat(values)


Parameter: TypeAlias = "PlainParameter | PackedParameter | MergedParameter"
StoredParameter: TypeAlias = "PlainParameter | PackedParameter"
