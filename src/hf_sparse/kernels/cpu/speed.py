"""Is the sparse product faster than the dense one here? Measured once per shape and machine.

For each class of products (`product.CLASSES`) each way is timed against `F.linear` of the dense
weight, interleaved, and medians are compared. Few tokens are timed on copies that together exceed
the last private cache, so that the weights come from memory as they do when a model decodes; many
tokens, where arithmetic is what takes time, on the first rows of the weight. What is slower than
dense at one token stays dense, so the other classes are then left out. `timing` keeps the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import timing
from ..machine import processor
from ..timing import Speeds, compare
from ..token_classes import TokenClass
from . import library
from .decode import decode
from .product import CLASSES, WAYS
from .weight import ROWS, TileWeight

COLD_BYTES = 16 << 20
COLD_TOKENS = 32  # up to so many the weight's way from memory counts
WARM_WEIGHTS = 1 << 21  # of a thread, beyond
COLD_ROUNDS, WARM_ROUNDS = 8, 3


def machine() -> str:
    """The processor with its threads and native path."""
    path = f"{list(library.paths())[-1]} {library.ABI_VERSION}"
    return f"{processor()}, {torch.get_num_threads()} threads, {path}"


def over_dense(weight: TileWeight, dtype: torch.dtype) -> dict[str, Speeds]:
    """Speed over the dense product with x of `dtype`, by class and way; empty if switched off."""
    sparsity = round(20 * (1 - weight.count / (weight.shape[0] * weight.shape[1]))) * 5
    group = weight.group_size if weight.scales is not None else 0
    values = f"{weight.dtype} values" + (f" in groups of {group}" if group else "")
    what = f"{values}, {sparsity} %"
    measure = functools.partial(_measure, weight, dtype)
    return timing.over_dense(weight.shape, dtype, what, machine(), CLASSES, measure)


def copies_of(nbytes: int) -> int:
    """How many of that size exceed the private caches."""
    return max(2, min(16, -(-COLD_BYTES // nbytes)))


def _measure(weight: TileWeight, dtype: torch.dtype, tokens: TokenClass) -> Speeds:
    """Speed over dense of each way that the class may take."""
    cold = tokens.measured <= COLD_TOKENS
    if not cold:
        weight = _first_rows(weight, WARM_WEIGHTS * torch.get_num_threads())
    dense = decode(weight).to(dtype)
    x = torch.randn(tokens.measured, weight.shape[1], device="cpu").to(dtype)
    copies = copies_of(dense.nbytes) if cold else 1
    weights = [weight, *(_copy(weight) for _ in range(copies - 1))]
    matrices = [dense, *(dense.clone() for _ in range(copies - 1))]
    seconds = compare(
        {
            **{way: (functools.partial(_call, WAYS[way], x), weights) for way in tokens.ways},
            "dense": (lambda matrix: F.linear(x, matrix), matrices),
        },
        COLD_ROUNDS if cold else WARM_ROUNDS,
    )
    return {way: seconds["dense"] / seconds[way] for way in tokens.ways}


def _call(way: Callable[..., Tensor], x: Tensor, weight: TileWeight) -> Tensor:
    return way(x, weight, None)


def _copy(weight: TileWeight) -> TileWeight:
    return replace(
        weight,
        masks=weight.masks.clone(),
        tile_base=weight.tile_base.clone(),
        block_off=weight.block_off.clone(),
        values=weight.values.clone(),
    )


def _first_rows(weight: TileWeight, weights: int) -> TileWeight:
    """A view of the first tiles with about that many weights."""
    rows, columns = weight.shape
    tiles = max(1, weights // (columns * ROWS))
    if tiles * ROWS >= rows:
        return weight
    return replace(
        weight,
        shape=(tiles * ROWS, columns),
        masks=weight.masks[:tiles],
        tile_base=weight.tile_base[: tiles + 1],
        block_off=weight.block_off[:tiles],
        scales=None if weight.scales is None else weight.scales[:tiles],
    )
