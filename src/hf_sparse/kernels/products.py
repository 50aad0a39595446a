"""How a packed weight is multiplied, by the number of tokens: the ways there are, and the choice.

One way isn't the fastest for every number of tokens: a token is bound by memory, hundreds by what
the processor's units can do. So a weight has a way for each of a few classes of products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from . import native, panels

WAYS: dict[str, Callable[[Tensor, native.T16Weight, Tensor | None], Tensor]] = {
    "packed": native.linear,
    "panels": panels.linear,
}
DEFAULT = "packed"


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
    ways: tuple[str, ...] = (DEFAULT,)


CLASSES = (
    TokenClass("1", 1, 1),
    TokenClass("2-32", 32, 16),
    TokenClass("33-255", 255, 128, tuple(WAYS)),
    TokenClass("256+", None, 512, tuple(WAYS)),
)


def class_of(tokens: int, classes: tuple[TokenClass, ...] = CLASSES) -> int:
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
    name: str = DEFAULT
    speedups: Mapping[str, float] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Over the dense product, of the way that is used."""
        return self.speedups.get(self.name)

    def __str__(self) -> str:
        others = "".join(f", {k} {v:.2f}" for k, v in self.speedups.items() if k != self.name)
        speed = "" if self.speedup is None else f" {self.speedup:.2f}"
        return f"for {self.tokens} {self.name}{speed}{others}"


def fastest(
    speedups: Mapping[str, Mapping[str, float]], classes: tuple[TokenClass, ...] = CLASSES
) -> tuple[Way, ...]:
    """The way of each class, from the speed-ups by class and way; or the first."""
    found = []
    for each in classes:
        measured = speedups.get(each.name, {})
        best = max(measured, key=lambda way: measured[way], default=each.ways[0])
        found.append(Way(each.name, best, measured))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Product:
    """A weight and the ways to multiply it; called as `native.linear` is."""

    weight: native.T16Weight
    ways: tuple[Way, ...] = fastest({})

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear(x, W, bias)` for x in fp32, bf16 or fp16, in x's dtype."""
        tokens = x.numel() // self.weight.shape[1]
        return WAYS[self.ways[class_of(tokens)].name](x, self.weight, bias)
