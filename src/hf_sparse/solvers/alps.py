"""`alps`: mask and weights together, by ADMM with a penalty that grows (Meng et al. 2024, alg. 1).

In the coordinates of `admm` (every input of the same scale), with the eigendecomposition of Hn:

    V = (W s Hn - Y + r D) (Hn + r I)^-1,   D = the largest of V + Y / r,   Y = Y + r (V - D)

Every third iteration the penalty r is raised by a factor that depends on how much of D's support
has changed since, so that it freezes slowly. The eigendecomposition takes O(in^3) with a large
constant; `admm` needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.errors import SolveError
from ..core.patterns import Pattern
from ..core.shapes import Weight
from ..core.statistics import Needs, Statistics
from .base import Solution, Solver
from .unit_scale import UnitScale

ITERATIONS = 42
CHECK_EVERY = 3
FIRST_PENALTY = 0.1
# Share of the kept weights that changed -> factor of the penalty.
STEPS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


@dataclass(frozen=True)
class ALPS(Solver):
    """Args: damping, fraction of mean(diag H) added to H."""

    damping: float = 0.01
    name: ClassVar[str] = "alps"
    needs: ClassVar[Needs] = Needs.HESSIAN
    about: ClassVar[str] = (
        "Finds mask and weights together, in 42 iterations and an eigendecomposition (Meng et "
        "al. 2024)."
    )

    def solve(self, weight: Weight, statistics: Statistics | None, pattern: Pattern) -> Solution:
        layer = UnitScale.of(weight, statistics, self.damping)
        try:
            values, vectors = torch.linalg.eigh(layer.normal.double())
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise SolveError(
                f"the eigendecomposition of its Hessian failed ({error}): raise damping, or "
                "pass method='admm' or 'balanced'"
            ) from None
        values, vectors = values.float().clamp_min(0), vectors.float()
        sparse, dual = layer.weight.clone(), torch.zeros_like(layer.weight)
        right, shifted = torch.empty_like(sparse), torch.empty_like(sparse)
        mask = torch.ones_like(sparse, dtype=torch.bool)
        checked, penalty = mask, FIRST_PENALTY
        for i in range(ITERATIONS):
            if i % CHECK_EVERY == 0:
                inverse = (vectors / (values + penalty)) @ vectors.T
            # In place: fresh memory for every term takes longer than the product.
            torch.mul(sparse, penalty, out=right).add_(layer.goal).sub_(dual)
            torch.mm(right, inverse, out=shifted).add_(dual.div_(penalty))
            mask = pattern.mask(torch.abs(shifted, out=right))
            torch.mul(shifted, mask, out=sparse)
            torch.sub(shifted, sparse, out=dual).mul_(penalty)
            if (i + 1) % CHECK_EVERY == 0:
                changed = int((mask & ~checked).sum()) / max(1, int(mask.sum()))
                penalty *= next(factor for share, factor in STEPS if changed >= share)
                checked = mask
        return layer.solution(sparse, mask)
