"""`dense`: the weight as it is, for layers that packing would not make smaller.

weight  (out, in)  the values, zeros included
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import FormatError
from ..patterns import Pattern
from .base import Accepted, Format, Packed, Rejected, TensorSpec


@dataclass(frozen=True)
class Dense(Format):
    """Nothing is packed. A layer in this format stays the module that it was."""

    name: ClassVar[str] = "dense"

    @classmethod
    def fits(cls, weight: Float[Tensor, "out in"], pattern: Pattern) -> Accepted | Rejected:
        return Accepted(cls(), weight.numel() * weight.element_size())

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Dense:
        if parameters:
            raise FormatError(f"format 'dense' has no parameters, found {dict(parameters)}")
        return cls()

    def parameters(self) -> dict[str, Any]:
        return {}

    def specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(shape, None)}

    def pack(self, weight: Float[Tensor, "out in"]) -> Packed:
        return {"weight": weight.clone(memory_format=torch.contiguous_format)}

    def check(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        """Nothing beyond the shape can be wrong."""

    def unpack(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Float[Tensor, "out in"]:
        return tensors["weight"].to(dtype, copy=True)
