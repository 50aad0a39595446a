"""Gradual pruning: how much is gone at which step, and which weights go first.

The sparsity after step t follows Zhu & Gupta 2017, eq. 1, from 0 at t0 to s at t1:

    s_t = s (1 - (1 - (t - t0) / (t1 - t0))^3)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from jaxtyping import Bool, Float
from torch import Tensor

from ..core.errors import TrainingError
from ..core.patterns import Pattern, Unstructured, partial_mask


@dataclass(frozen=True)
class Cubic:
    """The steps of a run at which masks are chosen, and how far they go.

    Attributes:
        start: step t0, after which nothing is gone yet.
        end: step t1, after which all of it is.
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
        within = self.start < step < self.end
        return step == self.end or (within and (step - self.start) % self.frequency == 0)

    def last_due(self, step: int) -> int | None:
        """The latest step up to this one after which masks were chosen."""
        if step >= self.end:
            return self.end
        last = step - (step - self.start) % self.frequency
        return last if last > self.start else None

    def fraction(self, step: int) -> Fraction:
        """How much of the final sparsity is reached after a step, 0 to 1."""
        return 1 - (1 - Fraction(step - self.start, self.end - self.start)) ** 3


def _step(given: float, steps: int) -> int:
    return round(given * steps) if isinstance(given, float) else given


@dataclass(frozen=True, eq=False)
class Partial(Unstructured):
    """What a solver gets in the place of a pattern of whose zeros only a part is there yet.

    Attributes:
        sparsity: how many zeros there are by now.
        final: the pattern in the end.
        fraction: of its zeros that are there by now.
        gone: weights that go before all others, whatever their scores: those that went before.
    """

    final: Pattern
    fraction: Fraction
    gone: Bool[Tensor, "out in"]

    @classmethod
    def of(cls, final: Pattern, fraction: Fraction, gone: Bool[Tensor, "out in"]) -> Partial:
        """With the sparsity that follows from the others."""
        return cls(float(fraction) * final.sparsity, final, fraction, gone)

    def mask(
        self, scores: Float[Tensor, "out in"], *, per_row: bool = False
    ) -> Bool[Tensor, "out in"]:
        scores = scores.masked_fill(self.gone, -math.inf)
        return partial_mask(self.final, scores, self.fraction, per_row=per_row)
