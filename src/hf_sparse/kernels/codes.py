"""What kernels of quantised weights share."""

from __future__ import annotations

from torch import Tensor


def more_than_8_bits(codes: Tensor) -> str | None:
    """Why codes can't be held in 8 bits with sign; None if they can."""
    low, high = (int(code) for code in codes.aminmax())
    if low < -128 or high > 127:
        return f"takes codes of 8 bits with sign, these are {low} to {high}"
    return None
