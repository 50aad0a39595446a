"""x of any shape as rows that the library can read."""

from __future__ import annotations

import math

from torch import Tensor


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
