"""Products of many tokens by way of dense panels, for the library's matrix product.

The weight is decoded a few megabytes at a time into one piece of memory, which the library's
product reads while it is in the caches. Where that is fast at what the sparse kernels have to
emulate (bf16 units, say), the decoding costs less than it gains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native

PANEL_BYTES = 4 << 20


def linear(x: Tensor, weight: native.T16Weight, bias: Tensor | None = None) -> Tensor:
    """`native.linear`, panel by panel; codes times scales are rounded to x's dtype first."""
    n, k = weight.shape
    rows = x.reshape(-1, k)
    y = x.new_empty(rows.shape[0], n)
    own_bias = None if bias is None else bias.to(x.dtype)
    tiles = -(-n // native.ROWS)
    step = -(-tiles // -(-n * k * x.dtype.itemsize // PANEL_BYTES))  # panels of equal size
    memory = x.new_empty(step * native.ROWS * k)
    for begin in range(0, tiles, step):
        end = min(begin + step, tiles)
        panel = native.decode(weight, x.dtype, (begin, end), transposed=True, memory=memory)
        outputs = slice(begin * native.ROWS, end * native.ROWS)
        if own_bias is None:
            torch.mm(rows, panel, out=y[:, outputs])
        else:
            torch.addmm(own_bias[outputs], rows, panel, out=y[:, outputs])
    return y.view(*x.shape[:-1], n)
