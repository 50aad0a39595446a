"""`bitmask`: one bit a weight and the kept values, for any pattern.

    weight          (kept,)             the non-zero values in row-major order
    weight_bitmask  (out, ceil(in / 8)) uint8, bit j % 8 of byte j // 8 of row i: is W[i, j] kept?

Bits per weight at sparsity s with b-bit values: (1 - s) b + 1. Row offsets are not stored: they
are the running popcount of the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from ..core.bits import count_ones, nonzero_bits, padding_is_zero, unpack_bits
from ..core.counting import count_zeros, kept_values
from ..core.errors import FormatError
from ..core.patterns import Pattern
from .base import Accepted, Layout, Packed, Rejected, TensorSpec, stored_bytes


@dataclass(frozen=True)
class Bitmask(Layout):
    """Mask plus values; see the module's text for the layout."""

    name: ClassVar[str] = "bitmask"

    @classmethod
    def fits(
        cls, weight: Shaped[Tensor, "out in"], pattern: Pattern, value_bits: int | None = None
    ) -> Accepted | Rejected:
        rows, columns = weight.shape
        kept = weight.numel() - count_zeros(weight)
        values = stored_bytes(kept, weight, value_bits)
        return Accepted(cls(), values + rows * -(-columns // 8))

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Bitmask:
        if parameters:
            raise FormatError(f"format 'bitmask' has no parameters, found {dict(parameters)}")
        return cls()

    def parameters(self) -> dict[str, Any]:
        return {}

    def specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        return {
            "weight": TensorSpec((None,), None),
            "weight_bitmask": TensorSpec((rows, -(-columns // 8)), torch.uint8),
        }

    def count(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> int:
        return count_ones(tensors["weight_bitmask"])

    def pack(self, weight: Shaped[Tensor, "out in"]) -> Packed:
        bits = nonzero_bits(weight)
        return {"weight": kept_values(weight, bits), "weight_bitmask": bits}

    def sample(
        self, tensors: Mapping[str, Tensor], dense: Shaped[Tensor, "rows in"], first: int
    ) -> Shaped[Tensor, "..."]:
        rows, columns = dense.shape
        return dense[unpack_bits(tensors["weight_bitmask"][first : first + rows], columns)]

    def check(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        bitmask, values = tensors["weight_bitmask"], tensors["weight"]
        if not padding_is_zero(bitmask, shape[1]):
            raise FormatError(f"weight_bitmask has bits set behind column {shape[1]}")
        kept = self.count(tensors, shape)
        if kept != values.numel():
            raise FormatError(
                f"weight_bitmask marks {kept} kept weights, but weight holds {values.numel()}"
            )

    def unpack(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Shaped[Tensor, "out in"]:
        mask = unpack_bits(tensors["weight_bitmask"], shape[1])
        values = tensors["weight"].to(dtype)
        return torch.zeros(shape, dtype=dtype, device=mask.device).masked_scatter(mask, values)
