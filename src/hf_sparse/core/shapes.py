"""Tensors of one layer that many functions take: what they are and which shape they have."""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Bool, Float
from torch import Tensor

Weight: TypeAlias = Float[Tensor, "out in"]
Mask: TypeAlias = Bool[Tensor, "out in"]  # True = kept
Hessian: TypeAlias = Float[Tensor, "in in"]  # of the layer's inputs
