"""`magnitude`: the smallest |w| of the layer go (Han et al. 2015). Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.counting import zero_outside
from ..core.patterns import Pattern
from ..core.shapes import Weight
from ..core.statistics import Needs, Statistics
from .base import Solution, Solver


@dataclass(frozen=True)
class Magnitude(Solver):
    """Score |W_ij|, compared over the whole layer."""

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[Needs] = Needs.NOTHING
    about: ClassVar[str] = (
        "Removes the smallest weights of each layer; the fastest and the worst (Han et al. 2015)."
    )

    def solve(self, weight: Weight, statistics: Statistics | None, pattern: Pattern) -> Solution:
        scores = weight.abs()
        mask = pattern.mask(scores)
        return Solution(zero_outside(weight, mask, out=scores), mask)
