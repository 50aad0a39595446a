"""`tile`: the native CPU kernel, as a kernel of a layer and as a torch operator."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ...core.grids import Grid, QuantizedWeight, Scales
from ...formats import Format
from ...formats.base import Packed
from ...formats.bitmask import Bitmask
from ..base import Stored
from . import library
from .native_kernel import NativeKernel, native_operators
from .pack import narrow, pack, pack_dense, unpack
from .product import Product
from .weight import TileWeight

_VALUES = {number: dtype for dtype, number in library.NUMBERS.items()}

# The schema's names and order are those of `TileKernel.operands`.
_OPERANDS = (
    "Tensor masks, Tensor tile_base, Tensor block_off, Tensor values, Tensor? scales, "
    "int out_features, int in_features, int values_dtype, int group_size"
)


def _check(*operands: Any) -> Product[TileWeight]:
    masks, base, offsets, values, scales, *shape, number, group_size = operands
    if number not in _VALUES:
        raise ValueError(f"values_dtype is {number}, expected one of {_VALUES}")
    tensors = masks, base, offsets, values, scales
    return Product(TileWeight((shape[0], shape[1]), _VALUES[number], *tensors, group_size))


class TileKernel(NativeKernel[TileWeight]):
    """Sparse products on the CPU for values in fp32, bf16 and fp16, and codes of up to 8 bits."""

    name: ClassVar[str] = "tile"
    # x W' for a weight in the tile layout, in x's dtype. `values_dtype` numbers that of the values:
    # 0 fp32, 1 bf16, 2 fp16, 3 int8, 4 int4; the last two have scales, shared by `group_size`
    # columns.
    operators, alive = native_operators("tile_linear", _OPERANDS, 5, _check)

    @classmethod
    def _unfit(cls, stored: Stored) -> str | None:
        if (grid := stored.format.grid) is not None:
            size = grid.width(stored.shape[1])
            if size < stored.shape[1] and size % 2:
                return f"takes groups of an even number of columns, these have {size}"
        elif stored.values_dtype not in library.FLOATS:
            return f"has no kernel for values in {stored.values_dtype}"
        return None

    @classmethod
    def _pack(cls, stored: Stored, codes: QuantizedWeight | None) -> TileWeight:
        if codes is not None:
            return _pack_codes(codes)
        if isinstance(stored.format, Bitmask):
            tensors = stored.tensors
            mask, values = tensors["weight_bitmask"].contiguous(), tensors["weight"].contiguous()
            return pack(mask, values, stored.shape)
        return pack_dense(stored.dense(stored.values_dtype))

    @classmethod
    def _path(cls) -> str:
        return list(library.paths())[-1]

    def operands(self) -> tuple[Any, ...]:
        weight = self.product.weight
        number = library.NUMBERS[weight.dtype]
        tensors = weight.masks, weight.tile_base, weight.block_off, weight.values, weight.scales
        return *tensors, *weight.shape, number, weight.group_size

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
        return QuantizedWeight(codes, Scales(grid, scale, self._zero_points()))


def _pack_codes(weight: QuantizedWeight) -> TileWeight:
    """Codes of at most 8 bits, held in 4 where they fit."""
    codes, scales = weight.codes.to(torch.int8), weight.scales
    low, high = (int(code) for code in codes.aminmax())
    packed = pack_dense(codes, scales.scale, scales.grid.width(codes.shape[1]))
    return narrow(packed) if low >= -8 and high <= 7 else packed
