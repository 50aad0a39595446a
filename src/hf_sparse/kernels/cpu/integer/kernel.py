"""`integer`: codes times rounded activations, as a kernel of a layer and as a torch operator."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ....core.grids import QuantizedWeight, Scales
from ....formats import Format
from ....formats.base import Packed
from ...base import Stored
from .. import library
from ..native_kernel import NativeKernel, native_operators
from ..product import Product
from .weight import OCTET, IntegerWeight, pack

# The schema's names and order are those of `IntegerKernel.operands`.
_OPERANDS = (
    "Tensor masks, Tensor tile_base, Tensor values, Tensor scales, int out_features, "
    "int in_features, int group_size, int bits, int kept"
)


def _check(*operands: Any) -> Product[IntegerWeight]:
    masks, base, values, scales, rows, columns, group_size, bits, kept = operands
    weight = IntegerWeight((rows, columns), masks, base, values, scales, group_size, bits, kept)
    return Product(weight)


class IntegerKernel(NativeKernel[IntegerWeight]):
    """Products on the CPU of codes of up to 8 bits and activations that may be rounded to int8."""

    name: ClassVar[str] = "integer"
    # x W' with x rounded to int8, in x's dtype, for a weight in the octet layout. Its gradient is
    # that of the product with x as it is: x W, unrounded.
    operators, alive = native_operators("integer_linear", _OPERANDS, 4, _check)

    @classmethod
    def _unfit(cls, stored: Stored) -> str | None:
        if stored.activations != "int8":
            return 'rounds activations, which activations="int8" allows'
        if (grid := stored.format.grid) is None:
            return f"takes codes of up to 8 bits, these are values in {stored.values_dtype}"
        size = grid.width(stored.shape[1])
        if size < stored.shape[1] and size % OCTET:
            return f"takes groups of a multiple of {OCTET} columns, these have {size}"
        if library.available() and library.integer_path() == library.PLAIN_PATH:
            return "has no instructions for products of bytes that it knows on this CPU"
        return None

    @classmethod
    def _pack(cls, stored: Stored, codes: QuantizedWeight | None) -> IntegerWeight:
        assert codes is not None
        scales = codes.scales
        return pack(codes.codes.to(torch.int8), scales.scale, scales.grid.width(stored.shape[1]))

    @classmethod
    def _path(cls) -> str:
        return f"{library.integer_path()}, activations rounded to int8"

    def operands(self) -> tuple[Any, ...]:
        weight = self.product.weight
        numbers = weight.group_size, weight.bits, weight.kept
        return *weight.tensors.values(), *weight.shape, *numbers

    def packed(self, fmt: Format, dtype: torch.dtype) -> Packed:
        if fmt.grid is None:
            return fmt.pack(self.weight(dtype))
        scales = Scales(fmt.grid, self.product.weight.rows_scales.float(), self._zero_points())
        return fmt.pack(QuantizedWeight(self.product.weight.codes().to(torch.int16), scales))
