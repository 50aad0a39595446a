"""The values that a merged layer has on the pattern of the sparse one.

With W the sparse weight, M its pattern and T the weight of the layer with its adapter:

    masked     V = M * T                                nearest to T in each weight
    resolve    V = argmin tr((V - T) H (V - T)')        nearest to T in the layer's outputs
               over V with the pattern M                (`solvers.refit`)

A quantised layer is rounded to a grid of its kind, whose scales are fitted anew. The pattern stays
as it is to the last weight: what is kept never becomes 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...core.grids import QuantizedWeight
from ...formats import Format
from ...solvers import Solution
from ...solvers.refinement.refit import refit
from ...solvers.refinement.rounding import quantize


def values_on_pattern(
    target: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    fmt: Format,
    dtype: torch.dtype,
    hessian: Float[Tensor, "in in"] | None = None,
    steps: int = 0,
) -> Solution:
    """The values for a pattern, as a layer of a format holds them.

    Args:
        target: T, fp32.
        mask: M, True = kept.
        fmt: of the layer; codes for a quantised one.
        dtype: of the layer's weight.
        hessian: damped; None for the masked target.
        steps: of PCG, with a Hessian.

    Returns:
        A weight in `dtype`, of exactly the pattern; with its codes if the format has some.
    """
    weight = target.where(mask, 0)
    if hessian is not None:
        weight = refit(weight, target, mask, hessian, steps)
    if fmt.grid is not None:
        quantized = keep_codes(quantize(weight, mask, fmt.grid, hessian), weight, mask)
        return Solution(quantized.dequantize().to(dtype), mask, quantized=quantized)
    rounded = weight.to(dtype)
    least = torch.full_like(rounded, torch.finfo(dtype).smallest_normal)
    return Solution(rounded.where(~mask | (rounded != 0), least), mask)


def keep_codes(
    quantized: QuantizedWeight, weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"]
) -> QuantizedWeight:
    """Kept weights that were rounded to 0 go to the point beside it: to their own side, if the grid
    has one there."""
    codes, scales = quantized.codes, quantized.scales
    side = torch.where(weight < 0, -1, 1).to(codes.dtype)
    if scales.zero is not None:
        width = scales.grid.width(codes.shape[1])
        zero = scales.zero.repeat_interleave(width, dim=1)[:, : codes.shape[1]]
        side = side.where((side > 0) | (zero > 0), 1).where(
            (side < 0) | (zero < scales.grid.levels), -1
        )
    return QuantizedWeight(codes.where(~mask | (codes != 0), side), scales)
