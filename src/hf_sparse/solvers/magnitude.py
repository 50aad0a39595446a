"""`magnitude`: the smallest |w| of the layer go (Han et al. 2015). Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ..core.patterns import Pattern
from ..core.statistics import Needs, Statistics
from .base import Solution, Solver


@dataclass(frozen=True)
class Magnitude(Solver):
    """Score |W_ij|, compared over the whole layer."""

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[Needs] = Needs.NOTHING
    chooses_pattern: ClassVar[bool] = False

    def solve(
        self, weight: Float[Tensor, "out in"], statistics: Statistics | None, pattern: Pattern
    ) -> Solution:
        mask = pattern.mask(weight.abs())
        return Solution(weight.where(mask, 0), mask)
