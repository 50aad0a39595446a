"""The always-valid product: unpack the weight, then `F.linear`.

The packed tensors, not the dense weight, are kept for the backward pass: training an adapter on
top of a sparse model must not hold every layer dense at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..formats import Format


class SparseLinearFunction(torch.autograd.Function):
    """y = x W' + b for a packed W; differentiable in x and b, W is constant."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*batch in"],
        bias: Float[Tensor, " out"] | None,
        fmt: Format,
        shape: tuple[int, int],
        keys: tuple[str, ...],
        *tensors: Tensor,
    ) -> Float[Tensor, "*batch out"]:
        ctx.save_for_backward(*tensors)
        ctx.packing = fmt, shape, keys
        return F.linear(x, fmt.unpack(dict(zip(keys, tensors, strict=True)), shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        fmt, shape, keys = ctx.packing
        needs_x, needs_bias, *rest = ctx.needs_input_grad
        grad_x = grad_bias = None
        if needs_x:
            packed = dict(zip(keys, ctx.saved_tensors, strict=True))
            grad_x = grad @ fmt.unpack(packed, shape, grad.dtype)
        if needs_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
        return grad_x, grad_bias, *(None for _ in rest)


def sparse_linear(
    x: Float[Tensor, "*batch in"],
    bias: Float[Tensor, " out"] | None,
    fmt: Format,
    shape: tuple[int, int],
    packed: dict[str, Tensor],
) -> Float[Tensor, "*batch out"]:
    """`F.linear(x, W, bias)` in x's dtype, W given packed."""
    keys = tuple(packed)
    result: Tensor = SparseLinearFunction.apply(x, bias, fmt, shape, keys, *packed.values())  # type: ignore[no-untyped-call]
    return result
