"""`sparsegpt`: one-shot pruning with weight updates (Frantar & Alistarh 2023, algorithm 1).

Columns are visited from left to right. With U the upper Cholesky factor of H^-1, zeroing w in
column i costs w^2 / U_ii^2 and is made up for by the columns to its right:

    e = (w - w_masked) / U_ii,    W[:, i:] -= e U[i, i:]

The mask of a block of columns is chosen when the block is reached, on weights that earlier
blocks have already updated: for unstructured sparsity one threshold over all rows of the block,
for n:m at each group's first column. Updates reach later blocks as one matrix product.

Memory layout: the loop runs on W' (in, out), so that a column of W is a contiguous row. Within a
block, rank-1 updates touch only a strip of STRIP columns and the rest of the block follows by a
matrix product: the same sums in another order, with a quarter of the memory traffic.

On a GPU the columns of a block are one Triton kernel (`sparsegpt_triton`), unless they are rounded.

Dead inputs (H_jj = 0) score 0 and so go first; what is kept of them keeps its value.

With `bits`, what is kept is rounded to a grid in the same pass (sec. 3.5; GPTQ, Frantar et al.
2023): w_masked above becomes round(w_masked), and later columns make up for the rounding too. The
scales of a group are fitted when its first column is reached, on weights that all columns before
have updated, for what the pattern would keep of the group as it then is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.grids import Grid, QuantizedWeight, Scales
from ..core.inverse_factor import InverseFactor
from ..core.patterns import NM, Pattern, keep_highest
from ..core.shapes import Weight
from ..core.statistics import Needs, Statistics
from ..kernels.gpu import triton_works
from .base import Solution, Solver

STRIP = 32
LARGEST_KERNEL_BLOCK = 256  # columns: more would spill out of the registers


@dataclass(frozen=True)
class SparseGPT(Solver):
    """One-shot pruning, and rounding, with weight updates.

    Args:
        damping: fraction of mean(diag H) added to H.
        block_size: columns per mask.
        joint_grid: round what is kept to it in the same pass; None leaves it as it is.
        spend_hessian: nothing comes after that asks for the Hessian, whose memory the factor may
            take.
    """

    damping: float = 0.01
    block_size: int = 128
    joint_grid: Grid | None = None
    spend_hessian: bool = False
    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[Needs] = Needs.HESSIAN
    about: ClassVar[str] = (
        "Removes the weights that matter least to each layer's outputs, and moves the others "
        "to make up for them (Frantar & Alistarh 2023)."
    )

    def prepare(self, statistics: Statistics) -> None:
        statistics.inverse_factor(self.damping, self.spend_hessian)

    def solve(self, weight: Weight, statistics: Statistics | None, pattern: Pattern) -> Solution:
        assert statistics is not None
        factor = statistics.inverse_factor(self.damping, self.spend_hessian)
        updated = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        mask = torch.ones_like(updated, dtype=torch.bool)
        rounding = None
        if self.joint_grid is not None:
            rounding = _Rounding(self.joint_grid, updated, factor, pattern)
        columns, block = weight.shape[1], self._block(pattern)
        for start in range(0, columns, block):
            end = min(start + block, columns)
            errors = _solve_block(updated, mask, factor, pattern, start, end, rounding)
            updated[end:].addmm_(factor.upper[start:end, end:].T, errors, alpha=-1)
        raised = f"Hessian not positive definite: damping raised to {factor.damping:g}"
        notes = (raised,) if factor.damping != self.damping else ()
        quantized = None if rounding is None else rounding.result()
        return Solution(updated.T.contiguous(), mask.T.contiguous(), notes, quantized)

    def _block(self, pattern: Pattern) -> int:
        """Columns per block: whole n:m groups, since a group's mask is chosen at once."""
        if isinstance(pattern, NM):
            return -(-self.block_size // pattern.m) * pattern.m
        return self.block_size


class _Rounding:
    """The grid of a weight under way; `updated` is the solver's, (in, out)."""

    def __init__(
        self, grid: Grid, updated: Float[Tensor, "in out"], factor: InverseFactor, pattern: Pattern
    ) -> None:
        self.grid, self.updated, self.factor, self.pattern = grid, updated, factor, pattern
        self.width = grid.width(len(updated))
        self.fitted: list[Scales] = []

    def reach(
        self, column: int, first: int, last: int, errors: Float[Tensor, "done out"], end: int
    ) -> None:
        """Fit the scales of the group that begins at `column`, if one does.

        The columns from `last` on wait for the updates of the strip's columns from `first` on,
        and those from `end` on for those of the whole block, whose `errors` so far are given.
        """
        if column % self.width:
            return
        stop = min(column + self.width, len(self.updated))
        weights = self.updated[column:stop].clone()
        begin = column - len(errors)
        for waiting, since in ((slice(last, min(end, stop)), first), (slice(end, stop), begin)):
            if waiting.start < waiting.stop and since < column:
                update = self.factor.upper[since:column, waiting].T @ errors[since - begin :]
                weights[waiting.start - column : waiting.stop - column] -= update
        diagonal = self.factor.upper.diagonal()[column:stop].unsqueeze(1)
        scores = _scores(weights, diagonal, self.factor.dead[column:stop])
        kept = self.pattern.mask(scores.T.contiguous())
        self.fitted.append(self.grid.fit(weights.T.contiguous(), kept, search=False))

    def round(self, weights: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """A column of the group that was reached last."""
        return self.fitted[-1].round_column(weights, 0)

    def result(self) -> QuantizedWeight:
        """The codes of the finished weight, which lies on the grid."""
        zeros = [scales.zero for scales in self.fitted if scales.zero is not None]
        zero = torch.cat(zeros, dim=1) if zeros else None
        scale = torch.cat([scales.scale for scales in self.fitted], dim=1)
        return Scales(self.grid, scale, zero).round(self.updated.T)


def _solve_block(
    updated: Float[Tensor, "in out"],
    mask: Bool[Tensor, "in out"],
    factor: InverseFactor,
    pattern: Pattern,
    start: int,
    end: int,
    rounding: _Rounding | None,
) -> Float[Tensor, "block out"]:
    """Prune columns start..end in place; returns the scaled errors e of each column."""
    upper, dead = factor.upper[start:end, start:end], factor.dead[start:end]
    weights, kept = updated[start:end], mask[start:end]
    width, rows = weights.shape
    diagonal = upper.diagonal().unsqueeze(1)
    if not isinstance(pattern, NM):
        scores = _scores(weights, diagonal, dead).T.reshape(1, -1)
        count = pattern.column_zeros(rows, start, end)
        kept.copy_(keep_highest(scores, count).view(rows, width).T)
    if rounding is None and _fits_kernel(weights):
        return _solve_at_once(weights, kept, upper, dead, pattern)
    errors = torch.empty_like(weights)
    group = pattern.m if isinstance(pattern, NM) else width
    strip = -(-STRIP // group) * group if isinstance(pattern, NM) else STRIP
    scale = torch.empty_like(weights) if isinstance(pattern, NM) else (~kept) / diagonal
    for first in range(0, width, strip):
        last = min(first + strip, width)
        for i in range(first, last):
            if isinstance(pattern, NM) and i % group == 0:
                part = slice(i, min(i + group, width))
                scores = _scores(weights[part], diagonal[part], dead[part])
                kept[part] = pattern.mask(scores.T.contiguous()).T
                scale[part] = (~kept[part]) / diagonal[part]
            if rounding is None:
                error = torch.mul(weights[i], scale[i], out=errors[i])
            else:
                rounding.reach(start + i, start + first, start + last, errors[:i], end)
                rounded = rounding.round(weights[i]).mul_(kept[i])
                error = torch.sub(weights[i], rounded, out=errors[i]).div_(diagonal[i])
                weights[i] = rounded
            weights[i + 1 : last].addr_(upper[i, i + 1 : last], error, alpha=-1)
        weights[last:].addmm_(upper[first:last, last:].T, errors[first:last], alpha=-1)
    weights.masked_fill_(~kept, 0)
    return errors


def _fits_kernel(weights: Float[Tensor, "block out"]) -> bool:
    """Is there a kernel for a block of this size here?"""
    return (
        weights.is_cuda
        and len(weights) <= LARGEST_KERNEL_BLOCK
        and triton_works.obstacle(weights.device) is None
    )


def _solve_at_once(
    weights: Float[Tensor, "block out"],
    kept: Bool[Tensor, "block out"],
    upper: Float[Tensor, "block block"],
    dead: Bool[Tensor, " block"],
    pattern: Pattern,
) -> Float[Tensor, "block out"]:
    """`_solve_block` behind the choice of an unstructured mask, by the Triton kernel."""
    from .sparsegpt_triton import solve_block

    if not isinstance(pattern, NM):
        return solve_block(weights, kept, upper, dead, 0, 0, 0)
    tail = len(weights) % pattern.m
    drops = pattern.m - pattern.n, tail - pattern.kept(tail)
    return solve_block(weights, kept, upper, dead, pattern.m, *drops)


def _scores(weights: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:
    """w^2 / U_ii^2, the loss that zeroing each weight costs; 0 for dead inputs."""
    return (weights / diagonal).square().masked_fill(dead.unsqueeze(1), 0)
