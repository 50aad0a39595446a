"""`dense`: the weight as it is, for layers that packing would not make smaller.

weight  (out, in)  the values, zeros included
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from ..core.errors import FormatError
from ..core.patterns import Pattern
from .base import Accepted, Layout, Packed, Rejected, TensorSpec, stored_bytes


@dataclass(frozen=True)
class Dense(Layout):
    """Nothing is packed. A layer in this format stays the module that it was."""

    name: ClassVar[str] = "dense"

    @classmethod
    def fits(
        cls, weight: Shaped[Tensor, "out in"], pattern: Pattern, value_bits: int | None = None
    ) -> Accepted | Rejected:
        return Accepted(cls(), stored_bytes(weight.numel(), weight, value_bits))

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Dense:
        if parameters:
            raise FormatError(f"format 'dense' has no parameters, found {dict(parameters)}")
        return cls()

    def parameters(self) -> dict[str, Any]:
        return {}

    def specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(shape, None)}

    def count(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> int:
        return shape[0] * shape[1]

    def pack(self, weight: Shaped[Tensor, "out in"]) -> Packed:
        return {"weight": weight.clone(memory_format=torch.contiguous_format)}

    def sample(
        self, tensors: Mapping[str, Tensor], dense: Shaped[Tensor, "rows in"], first: int
    ) -> Shaped[Tensor, "..."]:
        return dense

    def check(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        """Nothing beyond the shape can be wrong."""

    def unpack(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Shaped[Tensor, "out in"]:
        return tensors["weight"].to(dtype, copy=True)
