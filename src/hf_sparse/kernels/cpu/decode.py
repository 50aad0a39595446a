"""A packed weight decoded to dense panels, and products of many tokens by way of them.

For a product the weight is decoded a few megabytes at a time into one piece of memory, which
torch's product reads while it is in the caches. Where that is fast at what the sparse kernels have
to emulate (bf16 units, say), the decoding costs less than it gains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library
from .tile_weight import ROWS, TileWeight

PANEL_BYTES = 4 << 20


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
        raise TypeError(f"a panel can be {library.FLOATS}, not {dtype}")
    rows = max(min(n, end * ROWS) - begin * ROWS, 0)
    if memory is None:
        memory = torch.empty(rows * k, dtype=dtype)
    library.check_tensor(memory, "memory", (dtype,))
    if memory.numel() < rows * k or not memory.is_contiguous():
        raise ValueError(f"memory of {memory.numel()} elements, {rows * k} are needed in a piece")
    code = library.library().tile_decode_panel(
        weight.address, library.path_number(path), begin, end, memory.data_ptr(),
        library.NUMBERS[dtype], rows if transposed else k, transposed, library.thread_pool(),
    )  # fmt: skip
    library.raise_on(code, "decoding")
    return memory.view(-1)[: rows * k].view((k, rows) if transposed else (rows, k))


def linear(x: Tensor, weight: TileWeight, bias: Tensor | None = None) -> Tensor:
    """`packed.linear`, panel by panel; codes times scales are rounded to x's dtype first."""
    n, k = weight.shape
    rows = x.reshape(-1, k)
    y = x.new_empty(rows.shape[0], n)
    own_bias = None if bias is None else bias.to(x.dtype)
    tiles = -(-n // ROWS)
    step = -(-tiles // -(-n * k * x.dtype.itemsize // PANEL_BYTES))  # panels of equal size
    memory = x.new_empty(step * ROWS * k)
    for begin in range(0, tiles, step):
        end = min(begin + step, tiles)
        panel = decode(weight, x.dtype, (begin, end), transposed=True, memory=memory)
        outputs = slice(begin * ROWS, end * ROWS)
        if own_bias is None:
            torch.mm(rows, panel, out=y[:, outputs])
        else:
            torch.addmm(own_bias[outputs], rows, panel, out=y[:, outputs])
    return y.view(*x.shape[:-1], n)
