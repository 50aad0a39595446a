"""Products with a packed weight: the ways there are, and the choice by the number of tokens.

One way isn't the fastest for every number of tokens: a token is bound by memory, hundreds by what
the processor's units can do. So a weight has a way for each of a few classes of products.

`packed` multiplies from the packed weight. `decoded` decodes a few megabytes of it at a time, a
block of rows, into one piece of memory that torch's product reads while it is in the caches. Where
torch is fast at what the sparse kernels have to emulate (bf16 units, say), the decoding costs less
than it gains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operator import check_input
from ..token_classes import TokenClass, Way, class_of, fastest
from . import library
from .decode import decode, dense
from .rows import as_rows
from .weight import ROWS, TileWeight

BLOCK_BYTES = 4 << 20  # of a decoded block


def packed_linear(
    x: Tensor, weight: TileWeight, bias: Tensor | None = None, path: str | None = None
) -> Tensor:
    """F.linear: x[..., K] W^T + bias[N], summed in fp32, in x's dtype.

    x may be fp32, bf16 or fp16 whatever the values are; rows of x may lie apart. `path` names the
    instruction set, by default the best one. The result doesn't depend on the number of threads.
    """
    n, k = weight.shape
    x = library.checked(x, "x", library.FLOATS)
    rows, stride = as_rows(x, k)
    if bias is not None:
        bias = library.checked(bias, "bias", library.FLOATS)
        library.check_shape(bias, "bias", (n,))
    y = x.new_empty(*x.shape[:-1], n)
    dtype = library.NUMBERS[x.dtype]
    code = library.library().tile_linear(
        weight.address,
        library.path_number(path),
        rows.data_ptr(),
        dtype,
        math.prod(x.shape[:-1]),
        stride,
        bias.data_ptr() if bias is not None else None,
        library.NUMBERS[bias.dtype] if bias is not None else 0,
        y.data_ptr(),
        dtype,
        n,
        library.thread_pool(),
    )
    library.raise_on(code, f"linear of x {tuple(x.shape)} and a weight of {n} x {k}")
    return y


def decoded_linear(x: Tensor, weight: TileWeight, bias: Tensor | None = None) -> Tensor:
    """The same by way of decoded blocks; codes times scales are rounded to x's dtype first."""
    n, k = weight.shape
    rows = x.reshape(-1, k)
    y = x.new_empty(rows.shape[0], n)
    own_bias = None if bias is None else bias.to(x.dtype)
    tiles = -(-n // ROWS)
    step = -(-tiles // -(-n * k * x.dtype.itemsize // BLOCK_BYTES))  # blocks of equal size
    memory = x.new_empty(step * ROWS * k)
    for begin in range(0, tiles, step):
        end = min(begin + step, tiles)
        block = decode(weight, x.dtype, (begin, end), transposed=True, memory=memory)
        outputs = slice(begin * ROWS, end * ROWS)
        if own_bias is None:
            torch.mm(rows, block, out=y[:, outputs])
        else:
            torch.addmm(own_bias[outputs], rows, block, out=y[:, outputs])
    return y.view(*x.shape[:-1], n)


WAYS: dict[str, Callable[[Tensor, TileWeight, Tensor | None], Tensor]] = {
    "packed": packed_linear,
    "decoded": decoded_linear,
}
CLASSES = (
    TokenClass("1", 1, 1, ("packed",)),
    TokenClass("2-32", 32, 16, ("packed",)),
    TokenClass("33-511", 511, 128, tuple(WAYS)),
    TokenClass("512+", None, 512, tuple(WAYS)),
)


@dataclass(frozen=True, eq=False)
class Product:
    """A weight, and how it is multiplied by the number of tokens."""

    weight: TileWeight
    ways: tuple[Way, ...] = fastest({}, CLASSES)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear(x, W, bias)` for x [..., in] in a floating-point dtype, which is the result's.

        fp64 is multiplied with the decoded weight, for gradcheck.
        """
        check_input(x, self.weight.shape[1])
        if x.dtype not in library.FLOATS:
            own_bias = None if bias is None else bias.to(x.dtype)
            return F.linear(x, dense(self.weight, x.dtype), own_bias)
        tokens = x.numel() // self.weight.shape[1]
        return WAYS[self.ways[class_of(tokens, CLASSES)].name](x, self.weight, bias)
