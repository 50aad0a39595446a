"""How a packed weight is multiplied, by the number of tokens: the ways there are, and the choice.

One way isn't the fastest for every number of tokens: a token is bound by memory, hundreds by what
the processor's units can do. So a weight has a way for each of a few classes of products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..token_classes import TokenClass, Way, class_of, fastest
from . import decode, tile_weight

WAYS: dict[str, Callable[[Tensor, tile_weight.TileWeight, Tensor | None], Tensor]] = {
    "packed": tile_weight.linear,
    "panels": decode.linear,
}
CLASSES = (
    TokenClass("1", 1, 1, ("packed",)),
    TokenClass("2-32", 32, 16, ("packed",)),
    TokenClass("33-511", 511, 128, tuple(WAYS)),
    TokenClass("512+", None, 512, tuple(WAYS)),
)


@dataclass(frozen=True, eq=False)
class Product:
    """A weight and the ways to multiply it; called as `packed.linear` is."""

    weight: tile_weight.TileWeight
    ways: tuple[Way, ...] = fastest({}, CLASSES)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear(x, W, bias)` for x in fp32, bf16 or fp16, in x's dtype."""
        tokens = x.numel() // self.weight.shape[1]
        return WAYS[self.ways[class_of(tokens, CLASSES)].name](x, self.weight, bias)
