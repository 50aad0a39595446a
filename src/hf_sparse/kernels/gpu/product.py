"""Products with a sliced weight: the ways there are, and the choice by the number of tokens.

Up to some tokens `packed`, from the packed weight; beyond, `decoded`, which decodes some rows at a
time, a window, into a matrix of at most 32 MB in bf16 and leaves the product to the library. Which
is taken for which number of tokens is measured.

Nothing waits for the device and no shape depends on data, so that products can be compiled and
captured in a CUDA graph. On a CPU the whole weight is decoded, to compile, export and test without
a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operator import check_input
from ..token_classes import TokenClass, Way, class_of, fastest
from .unpack import dense
from .weight import FLOATS, SlicedWeight


def _packed(x: Tensor, weight: SlicedWeight) -> Tensor:
    from .triton_product import product  # where it runs: Triton is no dependency

    y: Tensor = product(x, weight)
    return y


def _windows(x: Tensor, weight: SlicedWeight) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and those rows of the dense weight in x's dtype, until the next are asked for."""
    from .triton_decode import decode_window, windows

    rows, columns = weight.shape
    room = x.new_empty(min(weight.window, rows), columns)
    for first, last in windows(weight):
        yield slice(first, last), decode_window(weight, first, last, room)


def _decoded(x: Tensor, weight: SlicedWeight) -> Tensor:
    out = x.new_empty(len(x), weight.shape[0])
    for rows, dense_rows in _windows(x, weight):
        torch.mm(x, dense_rows.T, out=out[:, rows])
    return out


def _decoded_transposed(x: Tensor, weight: SlicedWeight) -> Tensor:
    """x W for x [tokens, out]."""
    out = x.new_zeros(len(x), weight.shape[1])
    for rows, dense_rows in _windows(x, weight):
        out.addmm_(x[:, rows], dense_rows)
    return out


WAYS = {"packed": _packed, "decoded": _decoded}
CLASSES = (
    TokenClass("1", 1, 1, ("packed",)),
    TokenClass("2-4", 4, 4, ("packed",)),
    TokenClass("5-16", 16, 16, ("packed", "decoded")),
    TokenClass("17-127", 127, 64, ("decoded", "packed")),
    TokenClass("128+", None, 2048, ("decoded",)),
)


@dataclass(frozen=True, eq=False)
class Product:
    """A weight, and how it is multiplied by the number of tokens."""

    weight: SlicedWeight
    ways: tuple[Way, ...] = fastest({}, CLASSES)

    def __call__(self, x: Tensor) -> Tensor:
        """x W' for x [..., in], in x's dtype."""
        check_input(x, self.weight.shape[1], (self.weight.values,))
        if not _runs_triton(x):
            return F.linear(x, dense(self.weight, x.dtype))
        rows = x.reshape(-1, x.shape[-1])
        y = WAYS[self.ways[class_of(len(rows), CLASSES)].name](rows, self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[0])

    def transposed(self, x: Tensor) -> Tensor:
        """x W for x [..., out], in x's dtype."""
        if not _runs_triton(x):
            return x @ dense(self.weight, x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        return _decoded_transposed(rows, self.weight).view(*x.shape[:-1], self.weight.shape[1])


def _runs_triton(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in FLOATS
