"""A weight packed in the tile layout of the native kernels.

`csrc/tiles.h` describes the layout and why it is so.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import library

ROWS = 16  # outputs of a tile
BLOCK_COLUMNS = 256  # columns between two entries of block_off
VALUE_PADDING = 64  # bytes that the decoders may read beyond the last value


@dataclass(frozen=True, eq=False)
class TileWeight:
    """A packed weight, checked when it is made: from then on the kernels trust its masks.

    masks: int32[tiles, pairs], bit 2 r + c for row r and column c of a pair
    tile_base: int64[tiles + 1]; block_off: int32[tiles, ceil(K / 256)]
    values: uint8[count * item size + 64], the kept values of `dtype`; of int4, two to a byte
    scales: fp32[tiles, groups, 16] for int8 and int4, else None; `group_size` columns share one

    The tensors must not be written to afterwards. `address` is that of the library's
    `tiles::Weight`.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    masks: Tensor
    tile_base: Tensor
    block_off: Tensor
    values: Tensor
    scales: Tensor | None = None
    group_size: int = 0
    _struct: library.Weight = field(init=False, repr=False)
    address: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        n, k = self.shape
        library.check_dims(n, k)
        tiles, pairs = -(-n // ROWS), -(-k // 2)
        if self.dtype not in library.NUMBERS:
            raise TypeError(f"values are {self.dtype}, expected one of {list(library.NUMBERS)}")
        for name, dtype, shape in (
            ("masks", torch.int32, (tiles, pairs)),
            ("tile_base", torch.int64, (tiles + 1,)),
            ("block_off", torch.int32, (tiles, -(-k // BLOCK_COLUMNS))),
            ("values", torch.uint8, None),
        ):
            self._take(name, dtype, shape)
        if (self.scales is None) != (self.dtype not in library.INTEGERS):
            raise ValueError(f"{self.dtype} values and scales {self.scales is not None}")
        if self.scales is not None:
            if self.group_size < 1 or (self.group_size < k and self.group_size % 2):
                raise ValueError(
                    f"group_size {self.group_size} must be positive, and even below K = {k}"
                )
            self._take("scales", torch.float32, (tiles, -(-k // self.group_size), ROWS))
        struct = library.Weight(
            n,
            k,
            self.masks.data_ptr(),
            self.tile_base.data_ptr(),
            self.block_off.data_ptr(),
            self.values.data_ptr(),
            self.scales.data_ptr() if self.scales is not None else None,
            self.values.numel(),
            min(self.group_size, k),  # which means the same and fits 64 bits
            library.NUMBERS[self.dtype],
        )
        object.__setattr__(self, "_struct", struct)
        object.__setattr__(self, "address", ctypes.addressof(struct))
        library.raise_on(library.library().tile_check(self.address), f"tile weight of {n} x {k}")

    def _take(self, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None) -> None:
        """Check a tensor, of any length if no shape is given."""
        tensor = library.checked(getattr(self, name), name, (dtype,))
        library.check_shape(tensor, name, shape or (tensor.numel(),))
        object.__setattr__(self, name, tensor)

    @property
    def count(self) -> int:
        """Kept values."""
        return int(self.tile_base[-1])

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        tensors = (self.masks, self.tile_base, self.block_off, self.values, self.scales)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        # The struct holds addresses: a copy is made, and checked, anew.
        return TileWeight, (
            self.shape,
            self.dtype,
            self.masks,
            self.tile_base,
            self.block_off,
            self.values,
            self.scales,
            self.group_size,
        )
