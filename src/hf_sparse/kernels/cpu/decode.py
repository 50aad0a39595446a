"""A packed weight, or some of its rows, decoded to a dense one."""

from __future__ import annotations

import torch
from torch import Tensor

from . import library
from .weight import ROWS, TileWeight


def decode(
    weight: TileWeight,
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
    n, k = weight.shape
    begin, end = tiles if tiles is not None else (0, -(-n // ROWS))
    if not 0 <= begin <= end <= -(-n // ROWS):
        raise ValueError(f"tiles {begin} to {end} of a weight that has {-(-n // ROWS)}")
    if dtype is None:
        dtype = torch.float32 if weight.dtype in library.INTEGERS else weight.dtype
    if dtype not in library.FLOATS:
        raise TypeError(f"a dense weight can be {library.FLOATS}, not {dtype}")
    rows = max(min(n, end * ROWS) - begin * ROWS, 0)
    if memory is None:
        memory = torch.empty(rows * k, dtype=dtype, device="cpu")
    memory = library.checked(memory, "memory", (dtype,))
    if memory.numel() < rows * k or not memory.is_contiguous():
        raise ValueError(f"memory of {memory.numel()} elements, {rows * k} are needed in a piece")
    code = library.library().tile_decode(
        weight.address, library.path_number(path), begin, end, memory.data_ptr(),
        library.NUMBERS[dtype], rows if transposed else k, transposed, library.thread_pool(),
    )  # fmt: skip
    library.raise_on(code, "decoding")
    return memory.view(-1)[: rows * k].view((k, rows) if transposed else (rows, k))


def dense(weight: TileWeight, dtype: torch.dtype) -> Tensor:
    """The dense weight in any floating-point dtype."""
    if dtype in library.FLOATS:
        return decode(weight, dtype)
    return decode(weight, torch.float32).to(dtype)
