"""One token times a dense bf16 or fp16 weight, as a torch operator.

In a sparse model the dense output head takes a larger part of each token's time than before, and
torch's product of one row doesn't read 16-bit weights as fast as memory gives them on every CPU.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...core.recording import transformed
from .. import timing
from ..operator import define
from ..token_classes import DENSE, TokenClass, over
from . import library
from .speed import machine

MEASURED_BYTES = 64 << 20  # of the weight's first rows
ONE_TOKEN = TokenClass("1", 1, 1, ("native",))


def fits(x: Tensor, weight: Tensor) -> bool:
    """Is it one row on the CPU, of the weight's 16-bit dtype?"""
    return (
        not transformed()  # which torch's custom operators know nothing of
        and x.dtype == weight.dtype
        and x.dtype in library.HALVES
        and not torch.is_autocast_enabled("cpu")  # whose dtype may be the other one
        and x.device.type == weight.device.type == "cpu"
        and x.shape[-1] == weight.shape[1]
        and x.numel() == weight.shape[1]
    )


def over_dense(weight: Float[Tensor, "out in"]) -> float | None:
    """Speed over `F.linear` at one token; None if measuring is off or there is no library."""
    if not library.available():
        return None
    shape, own = (weight.shape[0], weight.shape[1]), weight.detach()
    measure = functools.partial(_measure, own)
    found = timing.over_dense(shape, own.dtype, "dense", machine(), (ONE_TOKEN,), measure)
    return found[ONE_TOKEN.name]["native"] if found else None


def _measure(weight: Tensor, tokens: TokenClass) -> timing.Measured | None:
    x = torch.randn(tokens.measured, weight.shape[1], device="cpu").to(weight.dtype)
    # A head is larger than the private caches: it needs no copies to be cold.
    rows = [weight[: max(1, MEASURED_BYTES // (weight.shape[1] * weight.itemsize))]]
    seconds = timing.compare(
        {
            **{way: (functools.partial(dense_row, x), rows) for way in tokens.ways},
            DENSE: (functools.partial(F.linear, x), rows),
        }
    )
    return None if seconds is None else over(seconds)


def product(x: Tensor, weight: Tensor, path: str | None = None) -> Tensor:
    """F.linear of one row: x[..., K] with one row times a dense weight[N, K] of bf16 or fp16.

    Summed in fp32, in x's dtype, fp32, bf16 or fp16. The result doesn't depend on the number of
    threads.
    """
    x = library.checked(x, "x", library.FLOATS)
    weight = library.checked(weight, "weight", library.HALVES)
    if weight.dim() != 2 or weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} must have contiguous rows")
    n, k = weight.shape
    library.check_dims(n, k)
    if x.numel() != k or x.shape[-1:] != (k,):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected one row of {k}")
    row = x.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    code = library.library().tile_dense_row(
        n, k, weight.data_ptr(), library.NUMBERS[weight.dtype], weight.stride(0),
        library.path_number(path), row.data_ptr(), library.NUMBERS[x.dtype],
        y.data_ptr(), library.NUMBERS[y.dtype], library.thread_pool(),
    )  # fmt: skip
    library.raise_on(code, f"product of x {tuple(x.shape)} and a dense weight of {n} x {k}")
    return y


def _sizes(weight: Tensor) -> tuple[int, int]:
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (out, in)")
    return weight.shape[1], weight.shape[0]


# F.linear(x, W) for one row x[..., in] and W[out, in], in x's dtype, summed in fp32.
dense_row = define(
    "dense_row",
    "Tensor weight",
    _sizes,
    run=lambda x, weight: product(x, weight),
    gradient=lambda grad, weight: grad @ weight.to(grad.dtype),
    weight_gradient=lambda grad, x: grad.reshape(-1, 1) * x.reshape(1, -1),
)
