"""Products with a packed weight: the ways there are, and the choice by the number of tokens.

One way isn't the fastest for every number of tokens: a token is bound by memory, hundreds by what
the processor's units can do. So a weight has a way for each of a few classes of products.

`packed` multiplies from the packed weight. `decoded` decodes a few megabytes of it at a time, a
block of rows, into one piece of memory that torch's product reads while it is in the caches. Where
torch is fast at what the sparse kernels have to emulate (bf16 units, say), the decoding costs less
than it gains.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operator import check_input
from ..token_classes import TokenClass, Way, class_of, fastest
from . import library
from .native_weight import NativeWeight
from .rows import as_rows
from .wide import pays

W = TypeVar("W", bound=NativeWeight)


def packed_linear(
    x: Tensor, weight: NativeWeight, bias: Tensor | None = None, path: str | None = None
) -> Tensor:
    """F.linear: x[..., K] W^T + bias[N], summed in fp32, in x's dtype.

    x may be fp32, bf16 or fp16 whatever the values are; rows of x may lie apart. `path` names the
    instruction set, by default the best one. The result doesn't depend on the number of threads.

    With an `IntegerWeight` each token's x is rounded in blocks of 32 columns, or of the largest
    power of two that divides the groups if that is less, to multiples of max |x| / 127. Sums of
    integers are exact; scaled, they are added in fp32. So the error is at most half a multiple
    times sum |W| over a block's columns, added up over the blocks, and fp32's. A block with an
    infinity or a NaN makes all outputs of its token NaN.
    """
    n, k = weight.shape
    x = library.checked(x, "x", library.FLOATS)
    rows, stride = as_rows(x, k)
    if bias is not None:
        bias = library.checked(bias, "bias", library.FLOATS)
        library.check_shape(bias, "bias", (n,))
    y = x.new_empty(*x.shape[:-1], n)
    dtype = library.NUMBERS[x.dtype]
    code = getattr(library.library(), f"{weight.layout}_linear")(
        weight.address,
        library.path_number(path),
        rows.data_ptr(),
        dtype,
        math.prod(x.shape[:-1]),
        stride,
        bias.data_ptr() if bias is not None else None,
        library.NUMBERS[bias.dtype] if bias is not None else 0,
        y.data_ptr(),
        dtype,
        n,
        library.thread_pool(),
    )
    library.raise_on(code, f"{weight.layout} product of x {tuple(x.shape)} and {n} x {k}")
    return y


def decoded_linear(x: Tensor, weight: NativeWeight, bias: Tensor | None = None) -> Tensor:
    """The same by way of decoded blocks; codes times scales are rounded to x's dtype first, unless
    fp32 is the faster one here."""
    if x.dtype in library.HALVES and pays(x.dtype):  # blocks are decoded to fp32, which is exact
        wide = decoded_linear(x.float(), weight, None if bias is None else bias.float())
        return wide.to(x.dtype)
    n, k = weight.shape
    rows = x.reshape(-1, k)
    y = x.new_empty(rows.shape[0], n)
    own_bias = None if bias is None else bias.to(x.dtype)
    for outputs, block in weight.blocks(x.dtype):
        if own_bias is None:
            torch.mm(rows, block, out=y[:, outputs])
        else:
            torch.addmm(own_bias[outputs], rows, block, out=y[:, outputs])
    return y.view(*x.shape[:-1], n)


WAYS: dict[str, Callable[[Tensor, Any, Tensor | None], Tensor]] = {
    "packed": packed_linear,
    "decoded": decoded_linear,
}
CLASSES = (
    TokenClass("1", 1, 1, ("packed",)),
    TokenClass("2-32", 32, 16, ("packed",)),
    TokenClass("33-511", 511, 128, tuple(WAYS)),
    TokenClass("512+", None, 512, tuple(WAYS)),
)


def classes_of(weight: NativeWeight) -> tuple[TokenClass, ...]:
    """The classes of products with a weight."""
    pairs = zip(CLASSES, weight.ways, strict=True)
    return tuple(replace(each, ways=names) for each, names in pairs)


@dataclass(frozen=True, eq=False)
class Product(Generic[W]):
    """A weight, and how it is multiplied by the number of tokens."""

    weight: W
    ways: tuple[Way, ...] = fastest({}, CLASSES)
    _prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear(x, W, bias)` for x [..., in] in a floating-point dtype, which is the result's.

        fp64 is multiplied with the dense weight, as it is, for gradcheck.
        """
        where = None if bias is None else _place(bias)
        prepared = self._prepared.get((x.dtype, x.shape, where))
        if prepared is not None and x.layout is _STRIDED and x.is_cpu and x.is_contiguous():
            # A token, as a model decodes, with as few steps as there can be: of a small layer they
            # take longer than its arithmetic.
            row, address, template, _ = prepared
            if not x.is_neg():
                y: Tensor = _empty_like(template)
                if row(address, x.data_ptr(), y.data_ptr()) == 0:
                    return y
        check_input(x, self.weight.shape[1])
        if x.dtype not in library.FLOATS:
            own_bias = None if bias is None else bias.to(x.dtype)
            return F.linear(x, self.weight.dense(x.dtype), own_bias)
        tokens = x.numel() // self.weight.shape[1]
        y = WAYS[self.ways[class_of(tokens, CLASSES)].name](x, self.weight, bias)
        if tokens == 1 and self.ways[0].name == "packed" and (bias is None or not bias.is_neg()):
            self._prepared.clear()  # of a bias that may be gone
            self._prepared[x.dtype, x.shape, where] = self._prepare(y, bias)
        return y

    def _prepare(self, y: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        """What stays the same in products of one token whose result is like y: the library's
        function, its argument, something to make the result like, and what these are views of."""
        row = library.Row(
            self.weight.address,
            None if bias is None else bias.data_ptr(),
            library.thread_pool(),
            library.NUMBERS[y.dtype],
            0 if bias is None else library.NUMBERS[bias.dtype],
        )
        template = y.new_empty(1).expand(y.shape)
        function = getattr(library.library(), f"{self.weight.layout}_row")
        return function, ctypes.addressof(row), template, row

    def __reduce__(self) -> tuple[Any, ...]:
        return Product, (self.weight, self.ways)  # what is prepared holds addresses


def _place(bias: Tensor) -> tuple[Any, ...]:
    """Where a bias lies, and how it is to be read."""
    return bias.data_ptr(), bias.dtype, bias.shape, bias.stride(), bias.is_neg()


_STRIDED, _empty_like = torch.strided, torch.empty_like
