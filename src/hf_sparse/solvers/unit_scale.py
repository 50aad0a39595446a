"""A layer in coordinates in which every input has the same scale, where `admm` and `alps` work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.shapes import Hessian, Mask, Weight
from ..core.statistics import Statistics
from .base import Solution
from .refinement.refit import keep_better


@dataclass(frozen=True)
class UnitScale:
    """A weight W and its damped Hessian Hd in the coordinates s = sqrt(diag Hd).

    Attributes:
        dense: W itself, (out, in).
        hessian: Hd.
        scale: s.
        normal: Hn = Hd / (s s'), whose diagonal is 1.
        weight: W s.
        goal: W s Hn.
    """

    dense: Weight
    hessian: Hessian
    scale: Float[Tensor, " in"]
    normal: Hessian
    weight: Weight
    goal: Weight

    @classmethod
    def of(cls, weight: Weight, statistics: Statistics | None, damping: float) -> UnitScale:
        """Of a layer whose statistics hold the Hessian."""
        assert statistics is not None
        hessian = statistics.damped_hessian(damping)
        scale = hessian.diagonal().sqrt()
        normal = hessian / torch.outer(scale, scale)
        scaled = (weight * scale).contiguous()
        return cls(weight, hessian, scale, normal, scaled, scaled @ normal)

    def solution(self, sparse: Weight, mask: Mask) -> Solution:
        """What was found in these coordinates; a row that the mask alone serves better is W's."""
        found, plain = sparse / self.scale, self.dense * mask
        return Solution(keep_better(found, plain, self.dense, self.hessian), mask)
