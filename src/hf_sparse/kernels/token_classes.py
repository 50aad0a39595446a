"""Products by their number of tokens: classes made the same way, and the fastest way of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MARGIN = 1.1  # by which another way must be faster: less is within a quick measurement's noise


@dataclass(frozen=True)
class TokenClass:
    """Products of so many tokens that they are made the same way.

    Attributes:
        name: e.g. "2-32".
        last: the highest number of tokens in it; None for no limit.
        measured: the number that stands for all of them.
        ways: names of those that may be the fastest.
    """

    name: str
    last: int | None
    measured: int
    ways: tuple[str, ...]


def class_of(tokens: int, classes: tuple[TokenClass, ...]) -> int:
    """Index of the class."""
    return next(i for i, c in enumerate(classes) if c.last is None or tokens <= c.last)


@dataclass(frozen=True)
class Way:
    """The way of one class, and what was measured.

    Attributes:
        tokens: the class's name.
        name: of the way.
        speedups: over the dense product, by way; empty if nothing was measured.
    """

    tokens: str
    name: str
    speedups: Mapping[str, float] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Over the dense product, of the way that is used."""
        return self.speedups.get(self.name)

    def __str__(self) -> str:
        others = "".join(f", {k} {v:.2f}" for k, v in self.speedups.items() if k != self.name)
        speed = "" if self.speedup is None else f" {self.speedup:.2f}"
        return f"for {self.tokens} {self.name}{speed}{others}"


DENSE = "dense"


def over(seconds: Mapping[str, float]) -> dict[str, float]:
    """Speed over the dense product, by way, of times that its own is among."""
    return {way: seconds[DENSE] / each for way, each in seconds.items() if way != DENSE}


def fastest(
    speedups: Mapping[str, Mapping[str, float]], classes: tuple[TokenClass, ...]
) -> tuple[Way, ...]:
    """The way of each class, from the speed-ups by class and way: the first, unless another one is
    clearly faster."""
    found = []
    for each in classes:
        measured = speedups.get(each.name, {})
        first = each.ways[0]
        best = max(measured, key=lambda way: measured[way], default=first)
        clear = best not in measured or measured[best] >= MARGIN * measured.get(first, 0)
        found.append(Way(each.name, best if clear else first, measured))
    return tuple(found)


def in_words(ways: tuple[Way, ...]) -> str:
    """What was measured, for a verdict's reason."""
    if all(way.speedup is None for way in ways):
        return "not measured"
    return "measured over dense: " + "; ".join(map(str, ways))
