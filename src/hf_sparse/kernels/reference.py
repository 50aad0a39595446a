"""The always-valid product: unpack the weight, then `F.linear`.

The packed tensors, not the dense weight, are kept for the backward pass: training an adapter on
top of a sparse model must not hold every layer dense at once. Where the values themselves are
trained, their gradient is that of the dense weight, dW = dY' X, at the kept places; dW is made
some rows at a time and is gone before the next layer's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.recording import transformed
from ..formats import Format, Layout

# Entries of dW that are made at once: 16 MB in fp32.
LARGEST_BLOCK = 1 << 22


class SparseLinearFunction(torch.autograd.Function):
    """y = x W' + b for a packed W; differentiable in x, b and the values of W."""

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
        packed = dict(zip(keys, tensors, strict=True))
        ctx.save_for_backward(x if packed["weight"].requires_grad else None, *tensors)
        ctx.packing = fmt, shape, keys
        return F.linear(x, fmt.unpack(packed, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        fmt, shape, keys = ctx.packing
        x, *tensors = ctx.saved_tensors
        packed = dict(zip(keys, tensors, strict=True))
        needs_x, needs_bias, _, _, _, *needed = ctx.needs_input_grad
        needs_values = dict(zip(keys, needed, strict=True))["weight"]
        grad_x = grad_bias = grad_values = None
        if needs_x:
            grad_x = grad @ fmt.unpack(packed, shape, grad.dtype)
        if needs_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
        if needs_values:
            grad_values = _values_gradient(fmt, packed, grad, x.to(grad.dtype))
        return (
            grad_x,
            grad_bias,
            *(grad_values if key == "weight" else None for key in ("fmt", "shape", "keys", *keys)),
        )


def check_not_integer(x: Tensor) -> None:
    """Raise a TypeError if a weight cast to x's dtype would lose its fractions."""
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"x is {x.dtype}, expected floating-point numbers")


def _values_gradient(
    fmt: Layout, packed: dict[str, Tensor], grad: Tensor, x: Tensor
) -> Float[Tensor, "..."]:
    """dY' X at the kept places, in the order and dtype of the values.

    The product is one of the operands' dtype, whose sums are fp32 also for bf16 and fp16: what is
    rounded is the sum, once, as in a dense layer.
    """
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    step = max(1, LARGEST_BLOCK // x.shape[1])
    parts = [
        fmt.sample(packed, grad[:, first : first + step].T @ x, first)
        for first in range(0, grad.shape[1], step)
    ]
    return torch.cat(parts).to(packed["weight"].dtype)


def sparse_linear(
    x: Float[Tensor, "*batch in"],
    bias: Float[Tensor, " out"] | None,
    fmt: Format,
    shape: tuple[int, int],
    packed: dict[str, Tensor],
) -> Float[Tensor, "*batch out"]:
    """`F.linear(x, W, bias)` in x's dtype, W given packed.

    Raises:
        TypeError: x holds integers, to which W would be rounded.
    """
    check_not_integer(x)
    if transformed():  # which knows the derivatives of what is done here, not of the function
        return F.linear(x, fmt.unpack(packed, shape, x.dtype), bias)
    keys = tuple(packed)
    result: Tensor = SparseLinearFunction.apply(x, bias, fmt, shape, keys, *packed.values())  # type: ignore[no-untyped-call]
    return result
