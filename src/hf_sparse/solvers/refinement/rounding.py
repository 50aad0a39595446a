"""Coordinate descent on a grid: kept weights move to other points of their grid as long as it pays.

Rounding each weight to its nearest point ignores that errors can make up for each other. With V on
the grid, T the weight to come close to and g the row of (V - T) Hd, the best point for v_j, all
others fixed, is the one nearest to

    v_j - g_j / Hd_jj

Columns are visited from left to right, SWEEPS times. No step raises tr((V - T) Hd (V - T)').
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from ...core.grids import Grid, QuantizedWeight

SWEEPS = 3
# Columns after which the gradient of all others is brought up to date, as one product.
BLOCK = 64


def quantize(
    target: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    grid: Grid,
    hessian: Float[Tensor, "in in"] | None,
) -> QuantizedWeight:
    """Round a pruned weight to a grid.

    Args:
        target: the pruned weight, 0 outside of the mask.
        mask: True = kept; what is not kept stays 0.
        grid: to which; scales are fitted to the target.
        hessian: damped; None to round to the nearest point and leave it at that.
    """
    if hessian is None:
        return grid.fit(target, mask).round(target)
    scales = grid.fit(target, mask, importance=hessian.diagonal())
    goal = target.T.contiguous()
    kept = mask.T
    value = scales.round(target).dequantize().T.contiguous()
    gradient = hessian @ (value - goal)
    inverse = (1 / hessian.diagonal()).tolist()
    for _ in range(SWEEPS):
        for start in range(0, len(goal), BLOCK):
            end = min(start + BLOCK, len(goal))
            before = value[start:end].clone()
            local = gradient[start:end].clone()
            for j in range(start, end):
                wanted = value[j] - local[j - start] * inverse[j]
                point = scales.round_column(wanted, j).mul_(kept[j])
                step = point - value[j]
                value[j] = point
                local.addr_(hessian[start:end, j], step)
            gradient.addmm_(hessian[:, start:end], value[start:end] - before)
    return scales.round(value.T)
