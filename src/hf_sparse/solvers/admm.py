"""`admm`: the mask grows while the weights adapt to it (Boza 2024, algorithm 1).

In coordinates in which every input has the same scale, s = sqrt(diag Hd), Hn = Hd / (s s'), the
weight V and its sparse copy Z are pulled together by the alternating direction method of
multipliers:

    Z = (V + U) * M,    U = V + U - Z,    V = (W s Hn + Z - U) (Hn + I)^-1

M keeps the largest |V + U|. The sparsity rises to its goal over the first GROWTH iterations, as
sp (1 - (1 - t / GROWTH)^3); then the mask stands still while the values settle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.patterns import Pattern, partial_mask
from ..core.shapes import Weight
from ..core.statistics import Needs, Statistics
from .base import Solution, Solver
from .unit_scale import UnitScale

ITERATIONS = 20
GROWTH = 15


@dataclass(frozen=True)
class ADMM(Solver):
    """Args: damping, fraction of mean(diag H) added to H."""

    damping: float = 0.01
    name: ClassVar[str] = "admm"
    needs: ClassVar[Needs] = Needs.HESSIAN
    about: ClassVar[str] = "Finds mask and weights together, in 20 iterations (Boza 2024)."

    def solve(self, weight: Weight, statistics: Statistics | None, pattern: Pattern) -> Solution:
        layer = UnitScale.of(weight, statistics, self.damping)
        shifted = layer.normal.clone()
        shifted.diagonal().add_(1)
        inverse = torch.linalg.inv(shifted.double()).float()
        value = layer.weight.clone()
        sparse, dual = torch.empty_like(value), torch.zeros_like(value)
        right = torch.empty_like(value)
        mask = torch.ones_like(value, dtype=torch.bool)
        for i in range(ITERATIONS):
            value.add_(dual)
            if i < GROWTH:
                share = 1 - (1 - (i + 1) / GROWTH) ** 3
                mask = partial_mask(pattern, torch.abs(value, out=right), share)
            torch.mul(value, mask, out=sparse)
            torch.sub(value, sparse, out=dual)
            torch.add(layer.goal, sparse, out=right).sub_(dual)
            torch.mm(right, inverse, out=value)
        return layer.solution(sparse, mask)
