"""One token times a dense bf16 or fp16 weight, as a torch operator.

In a sparse model the dense output head takes a larger part of each token's time than before, and
torch's product of one row doesn't read 16-bit weights as fast as memory gives them on every CPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..timing import compare, remembered
from . import library
from .speed import COLD_ROUNDS, machine


def fits(x: Tensor, weight: Tensor) -> bool:
    """Is it one row on the CPU, of the weight's 16-bit dtype?"""
    return (
        x.dtype == weight.dtype
        and x.dtype in library.HALVES
        and x.device.type == weight.device.type == "cpu"
        and x.shape[-1] == weight.shape[1]
        and x.numel() == weight.shape[1]
    )


def over_dense(weight: Float[Tensor, "out in"]) -> float | None:
    """Speed over `F.linear` at one token; None if measuring is off or there is no library."""
    if not library.available():
        return None
    x = torch.randn(1, weight.shape[1]).to(weight.dtype)
    shape = (weight.shape[0], weight.shape[1])
    found = remembered(
        shape,
        weight.dtype,
        "dense, 1 tokens",
        functools.partial(_measure, x, weight.detach()),
        machine(),
    )
    return None if found is None else found["gemv"]


def _measure(x: Tensor, weight: Tensor) -> dict[str, float]:
    # A head is larger than the private caches: it needs no copies to be cold.
    seconds = compare(
        {
            "gemv": (lambda matrix: gemv(x, matrix), [weight]),
            "dense": (lambda matrix: F.linear(x, matrix), [weight]),
        },
        COLD_ROUNDS,
    )
    return {"gemv": seconds["dense"] / seconds["gemv"]}


def product(x: Tensor, weight: Tensor, path: str | None = None) -> Tensor:
    """F.linear of one row: x[..., K] with one row times a dense weight[N, K] of bf16 or fp16.

    Summed in fp32, in x's dtype, fp32, bf16 or fp16. The result doesn't depend on the number of
    threads.
    """
    library.check_tensor(x, "x", library.FLOATS)
    library.check_tensor(weight, "weight", library.HALVES)
    if weight.dim() != 2 or weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} must have contiguous rows")
    n, k = weight.shape
    library.check_dims(n, k)
    if x.numel() != k or x.shape[-1:] != (k,):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected one row of {k}")
    row = x.contiguous()
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
    code = library.library().tile_gemv(
        n, k, weight.data_ptr(), library.NUMBERS[weight.dtype], weight.stride(0),
        library.path_number(path), row.data_ptr(), library.NUMBERS[x.dtype],
        y.data_ptr(), library.NUMBERS[y.dtype], library.thread_pool(),
    )  # fmt: skip
    library.raise_on(code, f"product of x {tuple(x.shape)} and a dense weight of {n} x {k}")
    return y


@torch.library.custom_op(
    "hf_sparse::gemv", mutates_args=(), schema="(Tensor x, Tensor w) -> Tensor"
)
def gemv(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear(x, W) for one row x[..., in] and W[out, in], in x's dtype, summed in fp32."""
    return product(x, weight)


@gemv.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad
    grad_x = grad @ weight if needs_x else None
    grad_weight = grad.reshape(-1, 1) * x.reshape(1, -1) if needs_weight else None
    return grad_x, grad_weight


gemv.register_autograd(_backward, setup_context=_setup_context)
