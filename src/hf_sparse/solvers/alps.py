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
from jaxtyping import Float
from torch import Tensor

from ..core.errors import SolveError
from ..core.patterns import Pattern
from ..core.statistics import Needs, Statistics
from .base import Solution, Solver
from .refinement.refit import keep_better

ITERATIONS = 42
CHECK_EVERY = 3
FIRST_PENALTY = 0.1
# Share of the kept weights that changed -> factor of the penalty.
STEPS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


@dataclass(frozen=True)
class ALPS(Solver):
    """Args: damp_percent, fraction of mean(diag H) added to H."""

    damp_percent: float = 0.01
    name: ClassVar[str] = "alps"
    needs: ClassVar[Needs] = Needs.HESSIAN
    chooses_pattern: ClassVar[bool] = False

    def solve(
        self, weight: Float[Tensor, "out in"], statistics: Statistics | None, pattern: Pattern
    ) -> Solution:
        assert statistics is not None
        hessian = statistics.damped_hessian(self.damp_percent)
        scale = hessian.diagonal().sqrt()
        normal = hessian / torch.outer(scale, scale)
        try:
            values, vectors = torch.linalg.eigh(normal.double())
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise SolveError(
                f"the eigendecomposition of its Hessian failed ({error}): raise damp_percent, or "
                "pass method='admm' or 'balanced'"
            ) from None
        values, vectors = values.float().clamp_min(0), vectors.float()
        start = (weight * scale).contiguous()
        goal = start @ normal
        sparse, dual = start, torch.zeros_like(start)
        mask = torch.ones_like(start, dtype=torch.bool)
        checked, penalty = mask, FIRST_PENALTY
        for i in range(ITERATIONS):
            if i % CHECK_EVERY == 0:
                inverse = (vectors / (values + penalty)) @ vectors.T
            value = (goal + penalty * sparse - dual) @ inverse
            shifted = value + dual / penalty
            mask = pattern.mask(shifted.abs())
            sparse = shifted * mask
            dual = penalty * (shifted - sparse)
            if (i + 1) % CHECK_EVERY == 0:
                changed = int((mask & ~checked).sum()) / max(1, int(mask.sum()))
                penalty *= next(factor for share, factor in STEPS if changed >= share)
                checked = mask
        return Solution(keep_better(sparse / scale, weight * mask, weight, hessian), mask)
