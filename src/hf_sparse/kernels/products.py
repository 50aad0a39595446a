"""How a packed weight is multiplied, by the number of tokens: the ways there are, and the choice.

One way isn't the fastest for every number of tokens: a token is bound by memory, hundreds by what
the processor's units can do. So a weight has a way for each of a few classes of products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from . import packed, panels

WAYS: dict[str, Callable[[Tensor, packed.T16Weight, Tensor | None], Tensor]] = {
    "packed": packed.linear,
    "panels": panels.linear,
}
DEFAULT = "packed"
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
    ways: tuple[str, ...] = (DEFAULT,)


CLASSES = (
    TokenClass("1", 1, 1),
    TokenClass("2-32", 32, 16),
    TokenClass("33-511", 511, 128, tuple(WAYS)),
    TokenClass("512+", None, 512, tuple(WAYS)),
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


@dataclass(frozen=True, eq=False)
class Product:
    """A weight and the ways to multiply it; called as `packed.linear` is."""

    weight: packed.T16Weight
    ways: tuple[Way, ...] = fastest({})

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear(x, W, bias)` for x in fp32, bf16 or fp16, in x's dtype."""
        tokens = x.numel() // self.weight.shape[1]
        return WAYS[self.ways[class_of(tokens)].name](x, self.weight, bias)
