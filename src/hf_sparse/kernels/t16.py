"""`t16`: the native CPU kernel, as a kernel of a layer and as a torch operator.

Outside of autograd and compilation a call goes straight to the library: torch's dispatcher would
add more to a small layer than its product takes. Otherwise it goes through the operator
`hf_sparse::t16_linear`, which has a fake implementation (shapes only) and a backward pass for x;
W is constant, and the bias is added outside of the operator so that it trains as usual.

The operator sees tensors only. The checked `T16Weight` they belong to is found by address among
those alive; tensors that belong to none (a program that was exported and loaded again) are
checked anew. So no tensor that a file or a caller brings reaches a kernel unchecked.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..formats import Format
from ..formats.base import Packed
from ..formats.bitmask import Bitmask
from ..logging import get_logger
from . import native, speed
from .base import Considered, Kernel, Stored, Verdict

logger = get_logger(__name__)

_VALUES = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16}
_NUMBERS = {dtype: number for number, dtype in _VALUES.items()}

_alive: weakref.WeakValueDictionary[int, native.T16Weight] = weakref.WeakValueDictionary()


class T16Kernel(Kernel):
    """Sparse products on the CPU for values in fp32, bf16 and fp16."""

    name: ClassVar[str] = "t16"

    def __init__(self, weight: native.T16Weight) -> None:
        self._weight = weight
        _alive[weight.masks.data_ptr()] = weight

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_weight"])  # type: ignore[misc]

    @classmethod
    def consider(cls, stored: Stored) -> Considered:
        reason = cls._obstacle(stored)
        if reason is not None:
            if not native.available():
                _warn_once(reason)
            return Considered(Verdict(cls.name, False, reason))
        if isinstance(stored.format, Bitmask):
            tensors = stored.tensors
            mask, values = tensors["weight_bitmask"].contiguous(), tensors["weight"].contiguous()
            weight = native.pack(mask, values, stored.shape)
        else:
            weight = native.pack_dense(stored.dense(stored.values_dtype))
        speedup = speed.over_dense(weight, stored.dtype)
        if speedup is not None and speedup < 1:
            reason = f"measured {speedup:.2f} of the dense product's speed at one token"
            return Considered(Verdict(cls.name, False, reason, speedup))
        measured = "not measured" if speedup is None else f"measured {speedup:.2f} x dense"
        best = list(native.paths())[-1]
        verdict = Verdict(cls.name, True, f"{best}, {measured} at one token", speedup)
        return Considered(verdict, cls(weight))

    @staticmethod
    def _obstacle(stored: Stored) -> str | None:
        if stored.device.type != "cpu":
            return f"runs on CPUs, the weight is on {stored.device}"
        if stored.values_dtype not in _NUMBERS:
            return f"has no kernel for values in {stored.values_dtype}"
        if max(stored.shape) > native.MAX_DIM:
            return f"takes at most {native.MAX_DIM} rows and columns"
        return native.unavailable_reason()

    def tensors(self) -> dict[str, Tensor]:
        weight = self._weight
        return {
            "t16_masks": weight.masks,
            "t16_tile_base": weight.tile_base,
            "t16_block_off": weight.block_off,
            "t16_values": weight.values,
        }

    def linear(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*batch out"]:
        compiling = torch.compiler.is_compiling()
        grad = torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        )
        if not compiling and not grad and x.dtype in _NUMBERS:
            return native.linear(x, self._weight, bias)
        weight = self._weight
        y: Tensor = t16_linear(x, *self.tensors().values(), *weight.shape, _NUMBERS[weight.dtype])
        return y if bias is None else y + bias.to(y.dtype)

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return _decode(self._weight, dtype)

    def packed(self, fmt: Format, dtype: torch.dtype) -> Packed:
        if isinstance(fmt, Bitmask):
            bitmask, values = native.unpack(self._weight)
            return {"weight": values.to(dtype), "weight_bitmask": bitmask}
        return fmt.pack(self.weight(dtype))


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("sparse layers are decoded to dense, the saving is on disk only: %s", reason)


def _decode(weight: native.T16Weight, dtype: torch.dtype) -> Tensor:
    if dtype in _NUMBERS:
        return native.decode(weight, dtype)
    return native.decode(weight, torch.float32).to(dtype)


def _find(
    masks: Tensor,
    tile_base: Tensor,
    block_off: Tensor,
    values: Tensor,
    out_features: int,
    in_features: int,
    values_dtype: int,
) -> native.T16Weight:
    known = _alive.get(masks.data_ptr())
    found = (masks, tile_base, block_off, values)
    if known is not None and known.shape == (out_features, in_features):
        own = (known.masks, known.tile_base, known.block_off, known.values)
        if all(a.data_ptr() == b.data_ptr() for a, b in zip(own, found, strict=True)):
            return known
    shape = (out_features, in_features)
    return native.T16Weight(shape, _VALUES[values_dtype], masks, tile_base, block_off, values)


_SCHEMA = (
    "(Tensor x, Tensor masks, Tensor tile_base, Tensor block_off, Tensor values, "
    "int out_features, int in_features, int values_dtype) -> Tensor"
)


@torch.library.custom_op("hf_sparse::t16_linear", mutates_args=(), schema=_SCHEMA)
def t16_linear(
    x: Tensor,
    masks: Tensor,
    tile_base: Tensor,
    block_off: Tensor,
    values: Tensor,
    out_features: int,
    in_features: int,
    values_dtype: int,
) -> Tensor:
    """x W' for a T16 weight of shape (out_features, in_features), in x's dtype.

    `values_dtype` numbers the dtype of the values: 0 fp32, 1 bf16, 2 fp16. fp64 x is multiplied
    with the decoded weight, for gradcheck.
    """
    weight = _find(masks, tile_base, block_off, values, out_features, in_features, values_dtype)
    if x.dtype in _NUMBERS:
        return native.linear(x, weight)
    return F.linear(x, _decode(weight, x.dtype))


@t16_linear.register_fake
def _(
    x: Tensor,
    masks: Tensor,
    tile_base: Tensor,
    block_off: Tensor,
    values: Tensor,
    out_features: int,
    in_features: int,
    values_dtype: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("hf_sparse::t16_linear_grad", mutates_args=(), schema=_SCHEMA)
def t16_linear_grad(
    x: Tensor,
    masks: Tensor,
    tile_base: Tensor,
    block_off: Tensor,
    values: Tensor,
    out_features: int,
    in_features: int,
    values_dtype: int,
) -> Tensor:
    """x W for x (..., out): takes the gradient of x W' back to its x. Decodes W for the call."""
    weight = _find(masks, tile_base, block_off, values, out_features, in_features, values_dtype)
    return x @ _decode(weight, x.dtype)


@t16_linear_grad.register_fake
def _(
    x: Tensor,
    masks: Tensor,
    tile_base: Tensor,
    block_off: Tensor,
    values: Tensor,
    out_features: int,
    in_features: int,
    values_dtype: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, out_features, in_features, values_dtype = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = out_features, in_features, values_dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = t16_linear_grad(grad.contiguous(), *ctx.saved_tensors, *ctx.numbers)
    return grad_x, *(None for _ in range(7))


t16_linear.register_autograd(_backward, setup_context=_setup_context)
