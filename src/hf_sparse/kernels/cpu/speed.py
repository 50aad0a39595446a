"""How long products with a packed weight take here, and with the dense one: a model of the cost.

A product's time is a call's plus so much for each weight. Both come from two shapes, a small one
that its call decides and a large one that its weights decide, timed for each kind of weight (dtype,
groups, share of kept values in quarters) and class of tokens, interleaved with `F.linear` of the
dense weight. So a machine is measured once, in a second or two, whatever shapes its models have.

A token is timed on copies that together exceed the private caches, so that the weights come from
memory as they do when a model decodes; many tokens, where arithmetic is what takes time, on one
weight. `timing` keeps the results.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.native import ABI_VERSION
from .. import timing
from ..machine import processor
from ..timing import Measured, compare
from ..token_classes import DENSE, TokenClass, Way, over
from . import library
from .columns.weight import ColumnWeight, hold_by_column
from .integer.weight import ANY, OCTET, IntegerWeight
from .integer.weight import pack as pack_integers
from .native_weight import NativeWeight
from .pack import narrow, pack_dense
from .product import CLASSES, Product, classes_of

SMALL, LARGE = (256, 256), (2048, 2048)
LARGE_MANY = (512, 2048)  # of many tokens
COLD_BYTES = 48 << 20
MOST_COPIES = 48
ABSURD = 100  # times as fast, or as slow, as dense: no kernel is

Item = TypeVar("Item")


@dataclass(frozen=True)
class Kind:
    """What a product's time depends on, beside shape and tokens.

    Attributes:
        values: dtype of the kept values.
        group_size: columns that share a scale; 0 if there is none, or one for a row.
        kept: share of the values that are kept, in quarters.
        dtype: of x and of the dense weight.
        each: of codes that are multiplied by rounded x, how many of each 8 are kept, as
            `IntegerWeight.kept` has it; None for x as it is.
        zeros: share of x that is 0, in tenths, of a weight held by column; None for others.
    """

    values: torch.dtype
    group_size: int
    kept: float
    dtype: torch.dtype
    each: int | None = None
    zeros: float | None = None

    @classmethod
    def of(cls, weight: NativeWeight, dtype: torch.dtype) -> Kind:
        """That of a weight, multiplied with x of a dtype."""
        grouped = weight.scales is not None and weight.group_size < weight.shape[1]
        quarters = min(4, max(1, round(4 * weight.share)))
        each = weight.kept if isinstance(weight, IntegerWeight) else None
        group_size = weight.group_size if grouped else 0
        zeros = round(weight.zero_inputs, 1) if isinstance(weight, ColumnWeight) else None
        return cls(weight.dtype, group_size, quarters / 4, dtype, each, zeros)

    def sample(self, shape: tuple[int, int]) -> NativeWeight:
        """A weight of this kind, with random values."""
        n, k = shape
        random = torch.Generator("cpu").manual_seed(0)
        order = torch.rand(n, k, generator=random, device="cpu")
        kept = order < self.kept
        if self.values not in library.INTEGERS:
            weight = torch.randn(n, k, generator=random, device="cpu")
            values = (weight * kept).to(self.values)
            return pack_dense(values) if self.zeros is None else hold_by_column(values, self.zeros)
        top = 7 if self.values == library.INT4 else 127
        codes = torch.randint(1, top + 1, (n, k), generator=random, dtype=torch.int8, device="cpu")
        group = self.group_size or k
        scales = torch.ones(n, -(-k // group), device="cpu")
        if self.each is None:
            packed = pack_dense(codes * kept, scales, group)
            return packed if self.values == torch.int8 else narrow(packed)
        if self.each != ANY:
            kept = (order.view(n, -1, OCTET).argsort(dim=2) < self.each).view(n, k)
        return pack_integers(codes * kept, scales, group, self.each)


def machine() -> str:
    """The processor with its native path."""
    return f"{processor()}, {list(library.paths())[-1]} {ABI_VERSION}"


def estimate(weight: NativeWeight, dtype: torch.dtype) -> dict[str, Measured]:
    """Seconds of a product with x of `dtype`, by class of tokens and way, and for the dense weight.

    Classes that could not be measured are missing; all are if measuring is switched off.
    """
    if not timing.enabled():
        return {}
    kind, weights = Kind.of(weight, dtype), weight.shape[0] * weight.shape[1]
    found: dict[str, Measured] = {}
    for tokens in classes_of(weight):
        times = _estimate(kind, tokens, weights)
        if times is not None:
            found[tokens.name] = times
    return found


def dense_token(shape: tuple[int, int], dtype: torch.dtype) -> float | None:
    """Seconds of `F.linear` of one token and a dense weight, both of `dtype`; None as above."""
    if not timing.enabled() or not library.available() or dtype not in library.FLOATS:
        return None
    times = _estimate(Kind(dtype, 0, 0.5, dtype), CLASSES[0], shape[0] * shape[1])
    return None if times is None else times[DENSE]


def _estimate(kind: Kind, tokens: TokenClass, weights: int) -> Measured | None:
    shapes = SMALL, LARGE if tokens.measured == 1 else LARGE_MANY
    small, large = (_times(kind, tokens, shape) for shape in shapes)
    if small is None or large is None:
        return None
    sizes = [rows * columns for rows, columns in shapes]
    return {way: _line(sizes, (small[way], large[way]), weights) for way in large}


def _line(sizes: list[int], seconds: tuple[float, float], at: int) -> float:
    """The time of a weight of that size, from those of two: neither part is below zero."""
    rate = max(0.0, (seconds[1] - seconds[0]) / (sizes[1] - sizes[0]))
    rate = min(rate, seconds[1] / sizes[1])
    return seconds[1] + rate * (at - sizes[1])


def _times(kind: Kind, tokens: TokenClass, shape: tuple[int, int]) -> Measured | None:
    """Seconds by way, and of the dense product, for one shape."""
    groups = f" in groups of {kind.group_size}" if kind.group_size else ""
    each = "" if kind.each is None else f", {kind.each} of 8, x in int8"
    zeros = "" if kind.zeros is None else f" by column, {kind.zeros:.0%} of x 0"
    what = f"{kind.values} values{groups}, {kind.kept:.0%} kept{each}{zeros}"
    place = f"{shape[0]}x{shape[1]}, {kind.dtype}, {what}, seconds of {tokens.measured} tokens"
    measure = functools.partial(_measure, kind, tokens, shape)
    return timing.remembered(f"{machine()}, {place}", (*tokens.ways, DENSE), measure)


def _measure(kind: Kind, tokens: TokenClass, shape: tuple[int, int]) -> Measured | None:
    weight = kind.sample(shape)
    dense = weight.dense(kind.dtype)
    x = torch.randn(tokens.measured, shape[1], device="cpu").to(kind.dtype)
    if kind.zeros is not None:
        x *= torch.rand(x.shape, device="cpu") >= kind.zeros
    copies = max(2, min(MOST_COPIES, COLD_BYTES // dense.nbytes)) if tokens.measured == 1 else 1
    weights, classes = _copies(weight, copies), classes_of(weight)

    def multiply(product: Product[NativeWeight]) -> Tensor:
        return product(x)

    seconds = compare(
        {
            way: (multiply, [Product(w, tuple(Way(c.name, way) for c in classes)) for w in weights])
            for way in tokens.ways
        }
        | {DENSE: (functools.partial(F.linear, x), _copies(dense, copies))}
    )
    if seconds is None:
        return None
    sane = all(1 / ABSURD < speedup < ABSURD for speedup in over(seconds).values())
    return seconds if sane else None


def _copies(first: Item, number: int) -> list[Item]:
    return [first, *(copy.deepcopy(first) for _ in range(number - 1))]
