"""`keep`: prunes nothing; packs the zeros that a checkpoint already has.

For dense files full of zeros, as SparseGPT's own code and others leave them. Sparsity and n:m
pattern of each layer are whatever its weight shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.patterns import Pattern
from ..core.shapes import Weight
from ..core.statistics import Needs, Statistics
from .base import Solution, Solver


@dataclass(frozen=True)
class Keep(Solver):
    """The identity; its mask is the weight's own."""

    name: ClassVar[str] = "keep"
    needs: ClassVar[Needs] = Needs.NOTHING
    about: ClassVar[str] = "Prunes nothing: packs the zeros that a checkpoint already has."
    chooses_pattern: ClassVar[bool] = True

    def solve(self, weight: Weight, statistics: Statistics | None, pattern: Pattern) -> Solution:
        return Solution(weight.clone(), weight != 0)
