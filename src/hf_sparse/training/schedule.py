"""Gradual pruning: how much is gone at which step, and which weights go first.

The sparsity after step t follows Zhu & Gupta 2017, eq. 1, from 0 at t0 to s at t1:

    s_t = s (1 - (1 - (t - t0) / (t1 - t0))^3)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.errors import TrainingError
from ..core.patterns import NM, Pattern, keep_highest


@dataclass(frozen=True)
class Cubic:
    """The steps of a run at which masks are chosen, and how far they go.

    Attributes:
        start: step t0, after which nothing is pruned yet.
        end: step t1, after which everything is.
        frequency: steps between two choices.
    """

    start: int
    end: int
    frequency: int

    @classmethod
    def over(cls, steps: int, start: float, end: float, frequency: int) -> Cubic:
        """For a run of so many steps; floats up to 1 are fractions of it.

        Raises:
            TrainingError: the end doesn't lie behind the start and within the run.
        """
        first, last = _step(start, steps), _step(end, steps)
        if not 0 <= first < last <= steps:
            raise TrainingError(
                f"start={start} and end={end} are steps {first} and {last} of a run of {steps}: "
                "pass 0 <= start < end within the run, or the final sparsity is never reached"
            )
        return cls(first, last, frequency)

    def due(self, step: int) -> bool:
        """Are masks chosen after this step?"""
        within = self.start <= step < self.end
        return step == self.end or (within and (step - self.start) % self.frequency == 0)

    def last_due(self, step: int) -> int | None:
        """The latest step up to this one after which masks were chosen."""
        if step >= self.end:
            return self.end
        if step < self.start:
            return None
        return step - (step - self.start) % self.frequency

    def fraction(self, step: int) -> Fraction:
        """How much of the final sparsity is reached after a step, 0 to 1."""
        return 1 - (1 - Fraction(step - self.start, self.end - self.start)) ** 3


def _step(given: float, steps: int) -> int:
    return round(given * steps) if isinstance(given, float) else given


def partial_mask(
    scores: Float[Tensor, "out in"], pattern: Pattern, per_row: bool, fraction: Fraction
) -> Bool[Tensor, "out in"]:
    """The pattern's mask, of whose zeros only a fraction, those of the lowest scores, is there yet.

    Args:
        scores: what is gone already has 0, so that it stays so.
        pattern: the final one; an n:m mask drops no weight on the way that it would keep.
        per_row: choose within each output row.
        fraction: how many of the pattern's zeros, floor of each row's or of all; 1 is exact.
    """
    final = pattern.mask(scores, per_row=per_row)
    if fraction == 1:
        return final
    by_row = per_row or isinstance(pattern, NM)
    candidates = scores.masked_fill(final, math.inf)
    rows = candidates if by_row else candidates.reshape(1, -1)
    zeros = int(torch.count_nonzero(~final)) // len(rows)
    return keep_highest(rows, math.floor(fraction * zeros)).view_as(scores)
