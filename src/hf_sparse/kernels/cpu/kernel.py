"""`tile`: the native CPU kernel, as a kernel of a layer and as a torch operator."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.grids import Grid, QuantizedWeight, Scales
from ...core.logging import get_logger
from ...formats import Format, Quantized
from ...formats.base import Packed
from ...formats.bitmask import Bitmask
from ..base import Considered, Stored, Verdict
from ..codes import more_than_8_bits
from ..operator import PackedKernel, define_product
from ..token_classes import fastest, in_words, over
from . import library, speed
from .decode import dense
from .pack import narrow, pack, pack_dense, unpack
from .product import CLASSES, Product
from .weight import TileWeight

logger = get_logger(__name__)

_VALUES = {number: dtype for dtype, number in library.NUMBERS.items()}

# The schema's names and order are those of `TileKernel.operands`.
_OPERANDS = (
    "Tensor masks, Tensor tile_base, Tensor block_off, Tensor values, Tensor? scales, "
    "int out_features, int in_features, int values_dtype, int group_size"
)


def _check(*operands: Any) -> Product:
    masks, base, offsets, values, scales, *shape, number, group_size = operands
    if number not in _VALUES:
        raise ValueError(f"values_dtype is {number}, expected one of {_VALUES}")
    tensors = masks, base, offsets, values, scales
    return Product(TileWeight((shape[0], shape[1]), _VALUES[number], *tensors, group_size))


class TileKernel(PackedKernel[Product]):
    """Sparse products on the CPU for values in fp32, bf16 and fp16, and codes of up to 8 bits."""

    name: ClassVar[str] = "tile"
    # x W' for a weight in the tile layout, in x's dtype. `values_dtype` numbers that of the values:
    # 0 fp32, 1 bf16, 2 fp16, 3 int8, 4 int4; the last two have scales, shared by `group_size`
    # columns.
    operators, alive = define_product(
        "tile_linear",
        _OPERANDS,
        shape=lambda *weight: weight[5:7],
        check=_check,
        product=lambda x, product: product(x),
        transposed=lambda x, product: x @ dense(product.weight, x.dtype),
    )

    @classmethod
    def take(cls, stored: Stored) -> Considered:
        if isinstance(stored.format, Quantized):
            codes = stored.format.quantized(stored.tensors, stored.shape)
            if (reason := more_than_8_bits(codes.codes)) is not None:
                return cls.refuse(reason)
            weight = _pack_codes(codes)
        elif isinstance(stored.format, Bitmask):
            tensors = stored.tensors
            mask, values = tensors["weight_bitmask"].contiguous(), tensors["weight"].contiguous()
            weight = pack(mask, values, stored.shape)
        else:
            weight = pack_dense(stored.dense(stored.values_dtype))
        seconds = speed.estimate(weight, stored.dtype)
        ways = fastest({name: over(times) for name, times in seconds.items()}, CLASSES)
        reason = f"{list(library.paths())[-1]}, {in_words(ways)}"
        one = seconds.get(CLASSES[0].name, {}).get(ways[0].name)
        verdict = Verdict(cls.name, True, reason, ways[0].speedup, ways, one)
        return Considered(verdict, cls(Product(weight, ways), stored.tensors.get("weight_zeros")))

    @staticmethod
    def obstacle(stored: Stored) -> str | None:
        if stored.form == "dense":
            return "a dense weight is preferred"
        if stored.device.type != "cpu":
            return f"runs on CPUs, the weight is on {stored.device}"
        if (grid := stored.format.grid) is not None:
            size = grid.width(stored.shape[1])
            if size < stored.shape[1] and size % 2:
                return f"takes groups of an even number of columns, these have {size}"
        elif stored.values_dtype not in library.FLOATS:
            return f"has no kernel for values in {stored.values_dtype}"
        if stored.dtype not in library.FLOATS:
            return f"has no kernel for inputs in {stored.dtype}"
        if max(stored.shape) > library.MAX_DIM:
            return f"takes at most {library.MAX_DIM} rows and columns"
        if (reason := library.unavailable_reason()) is not None:
            _warn_once(reason)
        return reason

    def tensors(self) -> dict[str, Tensor]:
        weight = self.product.weight
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
        weight = self.product.weight
        number = library.NUMBERS[weight.dtype]
        tensors = weight.masks, weight.tile_base, weight.block_off, weight.values, weight.scales
        return *tensors, *weight.shape, number, weight.group_size

    def _straight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self.product(x, bias)  # the bias too is added in fp32
        return y

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return dense(self.product.weight, dtype)

    def packed(self, fmt: Format, dtype: torch.dtype) -> Packed:
        if fmt.grid is not None:
            return fmt.pack(self._codes(fmt.grid))
        if isinstance(fmt, Bitmask):
            bitmask, values = unpack(self.product.weight)
            return {"weight": values.to(dtype), "weight_bitmask": bitmask}
        return fmt.pack(self.weight(dtype))

    def _codes(self, grid: Grid) -> QuantizedWeight:
        """The codes and scales that the weight was made of."""
        weight = self.product.weight
        assert weight.scales is not None
        rows = weight.shape[0]
        bitmask, values = unpack(weight)
        packed = {"weight": values, "weight_bitmask": bitmask}
        codes = Bitmask().unpack(packed, weight.shape, torch.int16)
        scale = weight.scales.transpose(1, 2).flatten(0, 1)[:rows].contiguous()
        zero = None if self._zeros is None else self._zeros.to(torch.int16)
        return QuantizedWeight(codes, Scales(grid, scale, zero))


def _pack_codes(weight: QuantizedWeight) -> TileWeight:
    """Codes of at most 8 bits, held in 4 where they fit."""
    codes, scales = weight.codes.to(torch.int8), weight.scales
    low, high = (int(code) for code in codes.aminmax())
    packed = pack_dense(codes, scales.scale, scales.grid.width(codes.shape[1]))
    return narrow(packed) if low >= -8 and high <= 7 else packed


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("sparse layers are decoded to dense, the saving is on disk only: %s", reason)
