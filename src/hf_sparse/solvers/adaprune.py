"""`adaprune`: magnitude mask, then kept weights trained to restore the output (Hubara et al. 2021).

Used as a one-shot method, layer by layer, as SparseGPT's comparison does. With M the mask of
`magnitude`, Adam minimises

    f(W^) = ||X (W - W^)'||^2 / T = tr((W - W^) H (W - W^)'),    gradient 2 (W^ - W) H on M,

which needs H = X'X / T only, no activations. H isn't damped.

Step size: with d_j = sqrt(H_jj), row i is solved for v_ij = w_ij d_j / r_i, where r_i is the root
mean square of w_ij d_j over the row: a Hessian with a unit diagonal, weights of about one, and with
both a rate that suits every layer. The rate falls to zero along a half cosine. Each row's loss is
known at every step, and its best iterate is returned: no row ends worse than it began.

Dead inputs (H_jj = 0) have no gradient: what is kept of them keeps its value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.patterns import Pattern
from ..core.shapes import Weight
from ..core.statistics import Needs, Statistics
from .base import Solution, Solver


@dataclass(frozen=True)
class AdaPrune(Solver):
    """STEPS steps of Adam with a rate that falls from RATE to 0."""

    name: ClassVar[str] = "adaprune"
    needs: ClassVar[Needs] = Needs.HESSIAN
    about: ClassVar[str] = (
        "Removes the smallest weights and trains the others, 200 steps of Adam a layer (Hubara "
        "et al. 2021)."
    )
    STEPS: ClassVar[int] = 200
    RATE: ClassVar[float] = 0.03

    def solve(self, weight: Weight, statistics: Statistics | None, pattern: Pattern) -> Solution:
        assert statistics is not None
        assert statistics.hessian is not None
        dense = weight.contiguous()
        mask = pattern.mask(dense.abs())
        scale = statistics.hessian.diagonal().clamp(min=0).sqrt()
        unit = torch.where(scale > 0, 1 / scale, 0)
        hessian = statistics.hessian * unit * unit.unsqueeze(1)
        sizes = (dense * scale).square().mean(dim=1, keepdim=True).sqrt()
        sizes.clamp_(min=torch.finfo(sizes.dtype).tiny)
        lost = (dense * scale / sizes).where(~mask, 0)
        change = _adam(lost, hessian, mask, self.STEPS, self.RATE)
        return Solution((dense + change * unit * sizes).where(mask, 0), mask)


def _adam(
    lost: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    mask: Bool[Tensor, "out in"],
    steps: int,
    rate: float,
) -> Float[Tensor, "out in"]:
    """The change of the kept weights that makes up for those lost; each row's best iterate."""
    change, best = torch.zeros_like(lost), torch.zeros_like(lost)
    lowest = lost.new_full((len(lost),), torch.inf)
    optimizer = torch.optim.Adam([change], lr=rate)
    for step in range(steps + 1):
        error = change - lost
        gradient = error @ hessian
        losses = (error * gradient).sum(dim=1)
        better = losses < lowest
        best[better], lowest[better] = change[better], losses[better]
        change.grad = gradient.where(mask, 0)
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
    return best
