"""A weight packed in the tile layout of the native kernels.

`csrc/tiles.h` describes the layout and why it is so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from . import library
from .native_weight import NativeWeight

ROWS = 16  # outputs of a tile
BLOCK_COLUMNS = 256  # columns between two entries of block_off
BLOCK_BYTES = 4 << 20  # of a decoded block


@dataclass(frozen=True, eq=False)
class TileWeight(NativeWeight):
    """A weight of values or codes in tiles of 16 rows.

    masks: int32[tiles, pairs], bit 2 r + c for row r and column c of a pair
    tile_base: int64[tiles + 1]; block_off: int32[tiles, ceil(K / 256)]
    values: uint8[count * item size + 64], the kept values of `dtype`; of int4, two to a byte
    scales: fp32[tiles, groups, 16] for int8 and int4, else None; `group_size` columns share one
    """

    layout: ClassVar[str] = "tile"
    ways: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("packed",),
        ("packed",),
        ("packed", "decoded"),
        ("packed", "decoded"),
    )
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
        self._hold(
            library.Weight(
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
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is resident, by name."""
        names = "masks", "tile_base", "block_off", "values", "scales"
        return {name: each for name in names if (each := getattr(self, name)) is not None}

    @property
    def count(self) -> int:
        """Kept values."""
        return int(self.tile_base[-1])

    @property
    def share(self) -> float:
        """How much of the weight is kept, 0 to 1."""
        return self.count / (self.shape[0] * self.shape[1])

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The dense weight in any floating-point dtype."""
        if dtype in library.FLOATS:
            return self.decode(dtype)
        return self.decode(torch.float32).to(dtype)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "in rows"]]]:
        """Blocks of equal size."""
        n, k = self.shape
        tiles = -(-n // ROWS)
        step = -(-tiles // -(-n * k * dtype.itemsize // BLOCK_BYTES))
        memory = torch.empty(step * ROWS * k, dtype=dtype, device="cpu")
        for begin in range(0, tiles, step):
            end = min(begin + step, tiles)
            block = self.decode(dtype, (begin, end), transposed=True, memory=memory)
            yield slice(begin * ROWS, min(n, end * ROWS)), block

    def decode(
        self,
        dtype: torch.dtype | None = None,
        tiles: tuple[int, int] | None = None,
        path: str | None = None,
        transposed: bool = False,
        memory: Tensor | None = None,
    ) -> Tensor:
        """The dense rows of tiles [begin, end), all of them by default, in fp32, bf16 or fp16.

        Scales are applied. The dtype is the values' own, or fp32 for int8 and int4. The result is
        (rows, K), or (K, rows) if `transposed`, which takes less time; it lies at the beginning of
        `memory`, a contiguous tensor of the dtype with at least as many elements, if that is given.
        """
        n, k = self.shape
        begin, end = tiles if tiles is not None else (0, -(-n // ROWS))
        if not 0 <= begin <= end <= -(-n // ROWS):
            raise ValueError(f"tiles {begin} to {end} of a weight that has {-(-n // ROWS)}")
        if dtype is None:
            dtype = torch.float32 if self.dtype in library.INTEGERS else self.dtype
        if dtype not in library.FLOATS:
            raise TypeError(f"a dense weight can be {library.FLOATS}, not {dtype}")
        rows = max(min(n, end * ROWS) - begin * ROWS, 0)
        if memory is None:
            memory = torch.empty(rows * k, dtype=dtype, device="cpu")
        memory = library.checked(memory, "memory", (dtype,))
        if memory.numel() < rows * k or not memory.is_contiguous():
            raise ValueError(f"memory of {memory.numel()} elements: {rows * k} are needed in a row")
        code = library.library().tile_decode(
            self.address, library.path_number(path), begin, end, memory.data_ptr(),
            library.NUMBERS[dtype], rows if transposed else k, transposed, library.thread_pool(),
        )  # fmt: skip
        library.raise_on(code, "decoding")
        return memory.view(-1)[: rows * k].view((k, rows) if transposed else (rows, k))

    def __reduce__(self) -> tuple[Any, ...]:
        # The struct holds addresses: a copy is made, and checked, anew.
        tensors = self.masks, self.tile_base, self.block_off, self.values, self.scales
        return TileWeight, (self.shape, self.dtype, *tensors, self.group_size)
