"""`wanda`: score |W_ij| * ||X_j||_2, compared within each output row (Sun et al. 2023, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.counting import zero_outside
from ..core.patterns import Pattern
from ..core.shapes import Weight
from ..core.statistics import Needs, Statistics
from .base import Solution, Solver


@dataclass(frozen=True)
class Wanda(Solver):
    """No weight is changed; each row loses floor(sparsity * in)."""

    name: ClassVar[str] = "wanda"
    needs: ClassVar[Needs] = Needs.COLUMN_NORMS
    about: ClassVar[str] = (
        "Removes the smallest |weight| x norm of its input in each row, and changes nothing "
        "else (Sun et al. 2023)."
    )

    def solve(self, weight: Weight, statistics: Statistics | None, pattern: Pattern) -> Solution:
        assert statistics is not None
        assert statistics.column_norms is not None
        scores = weight.abs().mul_(statistics.column_norms)
        mask = pattern.mask(scores, per_row=True)
        return Solution(zero_outside(weight, mask, out=scores), mask)
