"""`integer`: codes times rounded activations, as a kernel of a layer and as a torch operator."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ....core.grids import QuantizedWeight, Scales
from ....formats import Format, Quantized
from ....formats.base import Packed
from ...base import Considered, Stored, Verdict
from ...codes import more_than_8_bits
from ...operator import PackedKernel, define_product
from .. import library
from .product import IntegerProduct
from .weight import OCTET, IntegerWeight, pack

# The schema's names and order are those of `IntegerKernel.operands`.
_OPERANDS = (
    "Tensor masks, Tensor tile_base, Tensor values, Tensor scales, int out_features, "
    "int in_features, int group_size, int bits, int kept"
)


def _check(*operands: Any) -> IntegerProduct:
    masks, base, values, scales, rows, columns, group_size, bits, kept = operands
    weight = IntegerWeight((rows, columns), masks, base, values, scales, group_size, bits, kept)
    return IntegerProduct(weight)


class IntegerKernel(PackedKernel[IntegerProduct]):
    """Products on the CPU of codes of up to 8 bits and activations that may be rounded to int8."""

    name: ClassVar[str] = "integer"
    # x W' with x rounded to int8, in x's dtype, for a weight in the octet layout. Its gradient is
    # that of the product with x as it is: x W, unrounded.
    operators, alive = define_product(
        "integer_linear",
        _OPERANDS,
        shape=lambda *weight: weight[4:6],
        check=_check,
        product=lambda x, product: product(x),
        transposed=lambda x, product: x @ product.weight.dense(x.dtype),
    )

    @classmethod
    def take(cls, stored: Stored) -> Considered:
        assert isinstance(stored.format, Quantized)
        quantized = stored.format.quantized(stored.tensors, stored.shape)
        if (reason := more_than_8_bits(quantized.codes)) is not None:
            return cls.refuse(reason)
        scales = quantized.scales
        width = scales.grid.width(stored.shape[1])
        weight = pack(quantized.codes.to(torch.int8), scales.scale, width)
        reason = f"{library.integer_path()}, activations rounded to int8"
        kernel = cls(IntegerProduct(weight), stored.tensors.get("weight_zeros"))
        return Considered(Verdict(cls.name, True, reason), kernel)

    @staticmethod
    def obstacle(stored: Stored) -> str | None:
        if stored.activations != "int8":
            return 'rounds activations, which activations="int8" allows'
        if stored.form == "dense":
            return "a dense weight is preferred"
        if stored.device.type != "cpu":
            return f"runs on CPUs, the weight is on {stored.device}"
        if (grid := stored.format.grid) is None:
            return f"takes codes of up to 8 bits, these are values in {stored.values_dtype}"
        size = grid.width(stored.shape[1])
        if size < stored.shape[1] and size % OCTET:
            return f"takes groups of a multiple of {OCTET} columns, these have {size}"
        if stored.dtype not in library.FLOATS:
            return f"has no kernel for inputs in {stored.dtype}"
        if max(stored.shape) > library.MAX_DIM:
            return f"takes at most {library.MAX_DIM} rows and columns"
        if not library.available():
            return library.unavailable_reason()
        if library.integer_path() == library.PLAIN_PATH:
            return "has no instructions for products of bytes that it knows on this CPU"
        return None

    def tensors(self) -> dict[str, Tensor]:
        tensors = {
            f"integer_{name}": tensor for name, tensor in self.product.weight.tensors.items()
        }
        return tensors if self._zeros is None else {**tensors, "integer_zeros": self._zeros}

    def operands(self) -> tuple[Any, ...]:
        weight = self.product.weight
        numbers = weight.group_size, weight.bits, weight.kept
        return *weight.tensors.values(), *weight.shape, *numbers

    def _straight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self.product(x, bias)  # the bias too is added in fp32
        return y

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return self.product.weight.dense(dtype)

    def packed(self, fmt: Format, dtype: torch.dtype) -> Packed:
        if fmt.grid is None:
            return fmt.pack(self.weight(dtype))
        zero = None if self._zeros is None else self._zeros.to(torch.int16)
        scales = Scales(fmt.grid, self.product.weight.rows_scales.float(), zero)
        return fmt.pack(QuantizedWeight(self.product.weight.codes().to(torch.int16), scales))
