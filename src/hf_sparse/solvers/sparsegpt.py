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

Dead inputs (H_jj = 0) score 0 and so go first; what is kept of them keeps its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..patterns import NM, Pattern, keep_highest
from ..statistics import InverseFactor, Needs, Statistics
from .base import Solution, Solver

STRIP = 32


@dataclass(frozen=True)
class SparseGPT(Solver):
    """Args: damp_percent, fraction of mean(diag H) added to H; block_size, columns per mask."""

    damp_percent: float = 0.01
    block_size: int = 128
    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[Needs] = Needs.HESSIAN
    chooses_pattern: ClassVar[bool] = False

    def solve(
        self, weight: Float[Tensor, "out in"], statistics: Statistics | None, pattern: Pattern
    ) -> Solution:
        assert statistics is not None
        factor = statistics.inverse_factor(self.damp_percent)
        upper, columns = factor.upper, weight.shape[1]
        updated = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        mask = torch.ones_like(updated, dtype=torch.bool)
        block = self._block(pattern)
        for start in range(0, columns, block):
            end = min(start + block, columns)
            errors = _solve_block(updated, mask, factor, pattern, start, end)
            updated[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        raised = f"Hessian not positive definite: damping raised to {factor.damping:g}"
        notes = (raised,) if factor.damping != self.damp_percent else ()
        return Solution(updated.T.contiguous(), mask.T.contiguous(), notes)

    def _block(self, pattern: Pattern) -> int:
        """Columns per block: whole n:m groups, since a group's mask is chosen at once."""
        if isinstance(pattern, NM):
            return -(-self.block_size // pattern.m) * pattern.m
        return self.block_size


def _solve_block(
    updated: Float[Tensor, "in out"],
    mask: Bool[Tensor, "in out"],
    factor: InverseFactor,
    pattern: Pattern,
    start: int,
    end: int,
) -> Float[Tensor, "block out"]:
    """Prune columns start..end in place; returns the scaled errors e of each column."""
    upper, dead = factor.upper[start:end, start:end], factor.dead[start:end]
    weights, kept = updated[start:end], mask[start:end]
    width, rows = weights.shape
    diagonal = upper.diagonal().unsqueeze(1)
    errors = torch.empty_like(weights)
    group = pattern.m if isinstance(pattern, NM) else width
    strip = -(-STRIP // group) * group if isinstance(pattern, NM) else STRIP
    if not isinstance(pattern, NM):
        scores = _scores(weights, diagonal, dead).T.reshape(1, -1)
        count = pattern.column_zeros(rows, start, end)
        kept.copy_(keep_highest(scores, count).view(rows, width).T)
        scale = (~kept) / diagonal
    else:
        scale = torch.empty_like(weights)
    for first in range(0, width, strip):
        last = min(first + strip, width)
        for i in range(first, last):
            if isinstance(pattern, NM) and i % group == 0:
                part = slice(i, min(i + group, width))
                scores = _scores(weights[part], diagonal[part], dead[part])
                kept[part] = pattern.mask(scores.T.contiguous()).T
                scale[part] = (~kept[part]) / diagonal[part]
            error = torch.mul(weights[i], scale[i], out=errors[i])
            weights[i + 1 : last].addr_(upper[i, i + 1 : last], error, alpha=-1)
        weights[last:].addmm_(upper[first:last, last:].T, errors[first:last], alpha=-1)
    weights.masked_fill_(~kept, 0)
    return errors


def _scores(weights: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:
    """w^2 / U_ii^2, the loss that zeroing each weight costs; 0 for dead inputs."""
    return (weights / diagonal).square().masked_fill(dead.unsqueeze(1), 0)
