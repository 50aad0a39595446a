"""What a solver is: a pure function from a weight and its input statistics to a sparse weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from ..core.grids import QuantizedWeight
from ..core.low_rank import LowRank
from ..core.patterns import Pattern
from ..core.shapes import Weight
from ..core.statistics import Needs, Statistics


@dataclass(frozen=True)
class Solution:
    """A solver's result.

    Attributes:
        weight: fp32, zero wherever the mask is False.
        mask: True = kept.
        quantized: the codes whose values `weight` has; None if it is on no grid.
        low_rank: what goes beside `weight`, fp32: the layer's weight is S + B A; None for nothing.
        notes: what the user should know, e.g. that the damping had to be raised.
    """

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    notes: tuple[str, ...] = ()
    quantized: QuantizedWeight | None = None
    low_rank: LowRank | None = None


class Solver(ABC):
    """One pruning method; a frozen dataclass whose fields are `SparseConfig` arguments.

    A solver sees tensors only, never a module, and changes none of its arguments, but for a Hessian
    that it is told to spend.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    about: ClassVar[str] = ""
    """What it does, in a sentence, for lists of methods."""
    chooses_pattern: ClassVar[bool] = False
    """True if the method decides itself how many zeros there are: sparsity is no argument then."""

    def check_shape(self, shape: tuple[int, int]) -> None:  # noqa: B027 - most take any
        """Raise a SolveError that says what to do unless the method takes an (out, in) weight."""

    def prepare(self, statistics: Statistics) -> None:  # noqa: B027 - most need nothing
        """Do what statistics alone allow, while the weight is not in memory in fp32 yet."""

    @abstractmethod
    def solve(self, weight: Weight, statistics: Statistics | None, pattern: Pattern) -> Solution:
        """Prune one fp32 weight to `pattern`.

        Args:
            weight: dense weight, fp32, left as it is.
            statistics: at least what `needs` names; None only if that is `Needs.NOTHING`.
            pattern: how many zeros, and where they may lie.
        """
