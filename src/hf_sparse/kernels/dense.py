"""`dense`: decode once and multiply with the library; what is left of the saving is on disk."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..formats import Format
from ..formats.base import Packed
from .base import Considered, Kernel, Stored, Verdict
from .gpu.room import dense_cost
from .reference import check_not_integer


class DenseKernel(Kernel):
    """Where no sparse kernel is there or pays; on a GPU, only if there is room for it."""

    name: ClassVar[str] = "dense"

    def __init__(self, weight: Float[Tensor, "out in"], stored: Packed | None = None) -> None:
        self._weight = weight
        # Codes can't be found again in the weight once it is rounded to its dtype.
        self._stored = stored

    @classmethod
    def consider(cls, stored: Stored) -> Considered:
        if stored.device.type == "cuda" and (cost := dense_cost(stored)) is not None:
            return Considered(Verdict(cls.name, False, cost))
        if stored.device.type not in ("cpu", "cuda"):
            reason = f"would take back the memory that packing saves on {stored.device}"
            return Considered(Verdict(cls.name, False, reason))
        reason = "decoded once: the saving is on disk only"
        if stored.form == "dense":
            reason += '; hf_sparse.prefer(model, "memory") packs it'
        weight = stored.dense(stored.dtype)
        packed = dict(stored.tensors) if stored.format.grid else None
        return Considered(Verdict(cls.name, True, reason, 1.0), cls(weight, packed))

    def tensors(self) -> dict[str, Tensor]:
        stored = {f"stored_{key}": tensor for key, tensor in (self._stored or {}).items()}
        return {"dense": self._weight, **stored}

    def linear(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*batch out"]:
        check_not_integer(x)
        own_bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, self._weight.to(x.dtype), own_bias)

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return self._weight.to(dtype, copy=True)

    def packed(self, fmt: Format, dtype: torch.dtype) -> Packed:
        if self._stored is not None:
            return dict(self._stored)
        return fmt.pack(self._weight.to(dtype))
