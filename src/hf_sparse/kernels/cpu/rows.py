"""x of any shape as rows that the library can read, and their product with a weight."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from . import library
from .integer.weight import IntegerWeight
from .weight import TileWeight


def as_rows(x: Tensor, k: int) -> tuple[Tensor, int]:
    """x[..., K] as contiguous rows that may lie apart, and how many items.

    Raises:
        ValueError: x has another width.
    """
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {k})")
    m = math.prod(x.shape[:-1])
    rows = x if x.dim() == 2 else x.reshape(m, k)
    stride = rows.stride(0)
    # A single row has no stride to speak of, and torch reports any number for it.
    if (k > 1 and rows.stride(1) != 1) or (m > 1 and stride < k):
        rows, stride = rows.contiguous(), k
    return rows, max(stride, k)


def multiply(
    linear: Callable[..., int],
    x: Tensor,
    weight: TileWeight | IntegerWeight,
    bias: Tensor | None,
    path: str | None,
) -> Tensor:
    """x[..., K] W^T + bias[N] in x's dtype, by the library's function for the weight's layout.

    Raises:
        TypeError, ValueError: x or the bias doesn't fit, or no path has that name.
        NativeError: the library refuses.
    """
    n, k = weight.shape
    x = library.checked(x, "x", library.FLOATS)
    rows, stride = as_rows(x, k)
    if bias is not None:
        bias = library.checked(bias, "bias", library.FLOATS)
        library.check_shape(bias, "bias", (n,))
    y = x.new_empty(*x.shape[:-1], n)
    dtype = library.NUMBERS[x.dtype]
    code = linear(
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
