"""`tile`: the native CPU kernel, as a kernel of a layer and as a torch operator.

Outside of autograd and compilation a call goes straight to the library: torch's dispatcher would
add more to a small layer than its product takes. Otherwise it goes through the operator
`hf_sparse::tile_linear`, which has a fake implementation (shapes only) and a backward pass for x;
W is constant, and the bias is added outside of the operator so that it trains as usual.

The operator sees tensors only. The checked weight that they belong to is found by address among
those alive; tensors that belong to none (a program that was exported and loaded again) are
checked anew. So no tensor that a file or a caller brings reaches a kernel unchecked.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...core.grids import Grid, QuantizedWeight, Scales
from ...core.logging import get_logger
from ...formats import Format, Quantized, pack_weight
from ...formats.base import Packed
from ...formats.bitmask import Bitmask
from ..base import Considered, Kernel, Stored, Verdict
from ..token_classes import fastest
from . import library, speed
from .decode import decode
from .product import CLASSES, Product
from .tile_weight import TileWeight, narrow, pack, pack_dense, unpack

logger = get_logger(__name__)

_VALUES = {number: dtype for dtype, number in library.NUMBERS.items()}

_alive: weakref.WeakValueDictionary[int, Product] = weakref.WeakValueDictionary()


class TileKernel(Kernel):
    """Sparse products on the CPU for values in fp32, bf16 and fp16, and codes of up to 8 bits."""

    name: ClassVar[str] = "tile"

    def __init__(self, product: Product, zeros: Tensor | None = None) -> None:
        self._product = product
        # Zero points, which the file needs and the product doesn't: codes are q - z.
        self._zeros = zeros
        _alive[self._weight.masks.data_ptr()] = product

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_product"], state["_zeros"])  # type: ignore[misc]

    @property
    def _weight(self) -> TileWeight:
        return self._product.weight

    @classmethod
    def consider(cls, stored: Stored) -> Considered:
        reason = cls._obstacle(stored)
        if reason is not None:
            if not library.available():
                _warn_once(reason)
            return Considered(Verdict(cls.name, False, reason))
        if isinstance(stored.format, Quantized):
            codes = stored.format.quantized(stored.tensors, stored.shape)
            low, high = (int(code) for code in codes.codes.aminmax())
            if low < -128 or high > 127:
                reason = f"takes codes of 8 bits with sign, these are {low} to {high}"
                return Considered(Verdict(cls.name, False, reason))
            weight = _pack_codes(codes, four_bits=low >= -8 and high <= 7)
        elif isinstance(stored.format, Bitmask):
            tensors = stored.tensors
            mask, values = tensors["weight_bitmask"].contiguous(), tensors["weight"].contiguous()
            weight = pack(mask, values, stored.shape)
        else:
            weight = pack_dense(stored.dense(stored.values_dtype))
        ways = fastest(speed.over_dense(weight, stored.dtype), CLASSES)
        speedup = ways[0].speedup
        if speedup is not None and speedup < 1:
            reason = f"measured {speedup:.2f} of the dense product's speed at one token"
            return Considered(Verdict(cls.name, False, reason, speedup))
        measured = "not measured"
        if speedup is not None:
            measured = "measured over dense: " + "; ".join(map(str, ways))
        reason = f"{list(library.paths())[-1]}, {measured}"
        verdict = Verdict(cls.name, True, reason, speedup, ways)
        return Considered(verdict, cls(Product(weight, ways), stored.tensors.get("weight_zeros")))

    @staticmethod
    def _obstacle(stored: Stored) -> str | None:
        if stored.device.type != "cpu":
            return f"runs on CPUs, the weight is on {stored.device}"
        if isinstance(stored.format, Quantized):
            size = stored.format.grid.width(stored.shape[1])
            if size < stored.shape[1] and size % 2:
                return f"takes groups of an even number of columns, these have {size}"
        elif stored.values_dtype not in library.FLOATS:
            return f"has no kernel for values in {stored.values_dtype}"
        if max(stored.shape) > library.MAX_DIM:
            return f"takes at most {library.MAX_DIM} rows and columns"
        return library.unavailable_reason()

    def tensors(self) -> dict[str, Tensor]:
        weight = self._weight
        tensors = {
            "tile_masks": weight.masks,
            "tile_base": weight.tile_base,
            "tile_offsets": weight.block_off,
            "tile_values": weight.values,
            "tile_scales": weight.scales,
            "tile_zeros": self._zeros,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def operands(self) -> tuple[Any, ...]:
        """The weight as the operator `hf_sparse::tile_linear` takes it, behind x."""
        return _Operands.of(self._weight)

    def linear(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*batch out"]:
        compiling = torch.compiler.is_compiling()
        grad = torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        )
        if not compiling and not grad and x.dtype in library.FLOATS:
            return self._product(x, bias)
        y: Tensor = tile_linear(x, *self.operands())
        return y if bias is None else y + bias.to(y.dtype)

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return _decode(self._weight, dtype)

    def packed(self, fmt: Format, dtype: torch.dtype) -> Packed:
        if isinstance(fmt, Quantized):
            return fmt.pack(self._codes(fmt.grid))
        if isinstance(fmt, Bitmask):
            bitmask, values = unpack(self._weight)
            return {"weight": values.to(dtype), "weight_bitmask": bitmask}
        return pack_weight(fmt, self.weight(dtype))

    def _codes(self, grid: Grid) -> QuantizedWeight:
        """The codes and scales that the weight was made of."""
        weight = self._weight
        assert weight.scales is not None
        rows = weight.shape[0]
        bitmask, values = unpack(weight)
        packed = {"weight": values, "weight_bitmask": bitmask}
        codes = Bitmask().unpack(packed, weight.shape, torch.int16)
        scale = weight.scales.transpose(1, 2).flatten(0, 1)[:rows].contiguous()
        zero = None if self._zeros is None else self._zeros.to(torch.int16)
        return QuantizedWeight(codes, Scales(grid, scale, zero))


def _pack_codes(weight: QuantizedWeight, four_bits: bool) -> TileWeight:
    """Codes of at most 8 bits, or 4 if `four_bits`, in the kernels' layout."""
    codes, scales = weight.codes.to(torch.int8), weight.scales
    size = scales.grid.width(codes.shape[1])
    packed = pack_dense(codes, scales.scale, size)
    return narrow(packed) if four_bits else packed


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("sparse layers are decoded to dense, the saving is on disk only: %s", reason)


def _decode(weight: TileWeight, dtype: torch.dtype) -> Tensor:
    if dtype in library.FLOATS:
        return decode(weight, dtype)
    return decode(weight, torch.float32).to(dtype)


class _Operands(NamedTuple):
    """A weight as the operators take it behind x: tensors and numbers."""

    masks: Tensor
    tile_base: Tensor
    block_off: Tensor
    values: Tensor
    scales: Tensor | None
    out_features: int
    in_features: int
    values_dtype: int
    group_size: int

    @classmethod
    def of(cls, weight: TileWeight) -> _Operands:
        number = library.NUMBERS[weight.dtype]
        return cls(*_tensors(weight), *weight.shape, number, weight.group_size)

    def product(self) -> Product:
        """Of the weight alive that these belong to; of a new one, checked, if there is none."""
        tensors, shape = self[:5], (self.out_features, self.in_features)
        dtype = _VALUES[self.values_dtype]
        known = _alive.get(self.masks.data_ptr())
        if known is not None:
            weight = known.weight
            described = (weight.shape, weight.dtype, weight.group_size)
            same = described == (shape, dtype, self.group_size)
            if same and _addresses(_tensors(weight)) == _addresses(tensors):
                return known
        return Product(TileWeight(shape, dtype, *tensors, self.group_size))


def _tensors(weight: TileWeight) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return weight.masks, weight.tile_base, weight.block_off, weight.values, weight.scales


def _addresses(tensors: tuple[Tensor | None, ...]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


_SCHEMA = (
    "(Tensor x, Tensor masks, Tensor tile_base, Tensor block_off, Tensor values, "
    "Tensor? scales, int out_features, int in_features, int values_dtype, int group_size) -> Tensor"
)


@torch.library.custom_op("hf_sparse::tile_linear", mutates_args=(), schema=_SCHEMA)
def tile_linear(x: Tensor, *weight: Any) -> Tensor:
    """x W' for a weight in the tile layout of shape (out_features, in_features), in x's dtype.

    The weight is given as the schema has it. `values_dtype` numbers the dtype of the values: 0
    fp32, 1 bf16, 2 fp16, 3 int8, 4 int4; the last two have scales, shared by `group_size` columns.
    fp64 x is multiplied with the decoded weight, for gradcheck.
    """
    product = _Operands(*weight).product()
    if x.dtype in library.FLOATS:
        return product(x)
    return F.linear(x, _decode(product.weight, x.dtype))


@tile_linear.register_fake
def _(x: Tensor, *weight: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], _Operands(*weight).out_features))


@torch.library.custom_op("hf_sparse::tile_linear_grad", mutates_args=(), schema=_SCHEMA)
def tile_linear_grad(x: Tensor, *weight: Any) -> Tensor:
    """x W for x (..., out): takes the gradient of x W' back to its x. Decodes W for the call."""
    return x @ _decode(_Operands(*weight).product().weight, x.dtype)


@tile_linear_grad.register_fake
def _(x: Tensor, *weight: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], _Operands(*weight).in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:6])
    ctx.numbers = inputs[6:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = tile_linear_grad(grad.contiguous(), *ctx.saved_tensors, *ctx.numbers)
    return grad_x, *(None for _ in range(9))


tile_linear.register_autograd(_backward, setup_context=_setup_context)
