"""What was removed of a mixture of experts, and what the choice was made by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MixtureReport:
    """One mixture of experts that lost some.

    Attributes:
        name: of the module that holds the experts.
        removed: the experts that went, by their numbers in the model as it was.
        scores: of all experts as it was, in order; those with the lowest went.
        shares: of the tokens that entered the mixture, how many were routed to each expert.
        tokens: how many entered it.
    """

    name: str
    removed: tuple[int, ...]
    scores: tuple[float, ...]
    shares: tuple[float, ...]
    tokens: int

    @property
    def lost_share(self) -> float:
        """Of all choices that the router made, those that fell on experts that went."""
        total = sum(self.shares)
        return sum(self.shares[i] for i in self.removed) / total if total else 0.0

    def __str__(self) -> str:
        gone = ", ".join(map(str, self.removed))
        return (
            f"{self.name}: {len(self.removed)} of {len(self.scores)} experts went ({gone}), with "
            f"{self.lost_share:.1%} of its router's choices"
        )


def removed_experts(mixtures: Sequence[MixtureReport]) -> str:
    """How many went, e.g. "8 of 32 experts"."""
    removed = sum(len(mixture.removed) for mixture in mixtures)
    return f"{removed} of {sum(len(mixture.scores) for mixture in mixtures)} experts"
