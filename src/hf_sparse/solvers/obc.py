"""`obc`: exact greedy pruning, one weight at a time (Frantar, Singh & Alistarh 2022, sec. 4).

Each output row w is a problem of its own. Optimal Brain Surgeon removes the weight p whose loss is
smallest and makes up for it with all that are left (algorithm 1):

    loss = w_p^2 / [H^-1]_pp,    w -= w_p / [H^-1]_pp H^-1[:, p]
    H^-1 -= H^-1[:, p] H^-1[p, :] / [H^-1]_pp          (lemma 1: the inverse without input p)

For n:m only weights of groups that may still lose one are considered. For unstructured sparsity
every row is pruned to the end and its losses are noted; then the layer's zeros are given to the
rows as if the cheapest next removal of all rows had been taken each time (sec. 4, global step).
Losses along a row may fall: a cheap removal behind a dear one has to wait for it. So each loss
counts as the highest that its row has seen up to there, and the smallest of those are taken. (The
published code sorts the losses as they are.)

The greedy order only serves to find the mask. Weights then come from removing all the zeros P of a
row at once (group OBS, the optimum on that mask, where the single steps lead too): the change d of
the kept weights K solves H_KK d_K = H_KP w_P.

Memory layout: one inverse a row is (in, in) in fp64, so rows are solved in chunks. Rank-1 downdates
are gathered over STRIP steps as H^-1 - U'U before the inverses are written: the same sums, with a
fraction of the memory traffic. Within a strip only the diagonal and the row at p are brought up to
date.

Dead inputs (H_jj = 0) cost nothing and so go first; what is kept of them keeps its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..core.errors import SolveError
from ..core.inverse_factor import damped
from ..core.patterns import NM, Pattern, keep_highest
from ..core.shapes import Hessian, Mask, Weight
from ..core.statistics import Needs, Statistics
from .base import Solution, Solver

STRIP = 32
# Of the rows' matrices that are live at once: the inverses, or the systems and their factors.
CHUNK_BYTES = 2**28


@dataclass(frozen=True)
class OBC(Solver):
    """Args: damping, fraction of mean(diag H) added to H.

    Time grows with out * in^3, so layers with more than MAX_INPUTS inputs are refused.
    """

    damping: float = 0.01
    name: ClassVar[str] = "obc"
    needs: ClassVar[Needs] = Needs.HESSIAN
    about: ClassVar[str] = (
        "Removes one weight after the other, exactly; time grows with outputs x inputs^3, at "
        "most 1024 inputs (Frantar et al. 2022)."
    )
    MAX_INPUTS: ClassVar[int] = 1024

    def check_shape(self, shape: tuple[int, int]) -> None:
        if shape[1] > self.MAX_INPUTS:
            raise SolveError(
                f"it has {shape[1]} inputs and method='obc' takes at most {self.MAX_INPUTS}, since "
                "its time grows with their cube for every output: use method='sparsegpt', or "
                "leave the layer dense with modules_to_not_convert"
            )

    def solve(self, weight: Weight, statistics: Statistics | None, pattern: Pattern) -> Solution:
        assert statistics is not None
        assert statistics.hessian is not None
        factor = statistics.inverse_factor(self.damping)
        hessian = damped(statistics.hessian, factor.damping, torch.float64)
        dense = weight.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        try:
            mask = _choose(dense, hessian, factor.dead, pattern)
            updated = _reconstruct(dense, hessian, mask).float()
        except LinAlgError:
            raise SolveError(
                f"its Hessian is too close to singular for method='obc' with damping="
                f"{self.damping}: use a larger damping, or more varied calibration data"
            ) from None
        raised = f"Hessian not positive definite: damping raised to {factor.damping:g}"
        notes = (raised,) if factor.damping != self.damping else ()
        return Solution(updated, mask, notes)


def _chunk(columns: int) -> int:
    """Rows that are solved at once: two fp64 matrices each."""
    return max(1, CHUNK_BYTES // (2 * 8 * columns**2))


def _choose(weight: Weight, hessian: Hessian, dead: Bool[Tensor, " in"], pattern: Pattern) -> Mask:
    """The mask: each row's greedy order, up to the number of zeros that the row gets."""
    rows, columns = weight.shape
    index = torch.arange(columns, device=weight.device)
    if isinstance(pattern, NM):
        group = index // pattern.m
        widths = group.bincount().tolist()
        room = index.new_tensor([width - pattern.kept(width) for width in widths])
    else:
        group = torch.zeros_like(index)
        room = index.new_tensor([min(columns, pattern.zeros(rows * columns))])
    # In the order of columns in which `inverse_factor` has shown that it can be factorised.
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    inverse = torch.cholesky_inverse(lower).flip(0, 1)
    floor = 1 / hessian.diagonal()
    parts = torch.split(weight, _chunk(columns))
    traces = [_greedy(part, inverse, floor, dead, group, room) for part in parts]
    order, losses = (torch.cat(of_rows) for of_rows in zip(*traces, strict=True))
    if not bool(torch.isfinite(losses).all()):
        raise LinAlgError("the downdates have lost all precision")
    taken = torch.ones_like(order, dtype=torch.bool)
    if not isinstance(pattern, NM):
        highest = losses.cummax(dim=1).values.reshape(1, -1)
        taken = ~keep_highest(highest, pattern.zeros(rows * columns)).view_as(order)
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, order, ~taken)


def _greedy(
    weight: Float[Tensor, "rows in"],
    inverse: Float[Tensor, "in in"],
    floor: Float[Tensor, " in"],
    dead: Bool[Tensor, " in"],
    group: Int[Tensor, " in"],
    room: Int[Tensor, " groups"],
) -> tuple[Int[Tensor, "rows steps"], Float[Tensor, "rows steps"]]:
    """Remove weights from each row until no group has room: which ones, and at what loss.

    Args:
        weight: some rows of the layer, fp64.
        inverse: H^-1.
        floor: 1 / H_jj, below which no diagonal of an inverse falls, whatever is removed.
        dead: inputs whose weights cost nothing.
        group: the group that each input is in.
        room: how many weights each group loses.
    """
    rows, columns = weight.shape
    each, steps = torch.arange(rows, device=weight.device), int(room.sum())
    weight, inverse = weight.clone(), inverse.repeat(rows, 1, 1)
    diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
    room = room.repeat(rows, 1)
    removed = torch.zeros_like(weight, dtype=torch.bool)
    order, losses = group.new_empty(rows, steps), weight.new_empty(rows, steps)
    for first in range(0, steps, STRIP):
        factors = weight.new_empty(rows, min(STRIP, steps - first), columns)
        for i in range(factors.shape[1]):
            scores = (weight.square() / diagonal).masked_fill_(dead, 0)
            scores.masked_fill_(removed | (room[:, group] == 0), torch.inf)
            p = scores.argmin(dim=1)
            order[:, first + i], losses[:, first + i] = p, scores[each, p]
            pivot = diagonal[each, p].unsqueeze(1)
            before = factors[:, :i]
            row = torch.baddbmm(
                inverse[each, p].unsqueeze(1), before[each, :, p].unsqueeze(1), before, alpha=-1
            ).squeeze(1)
            factors[:, i] = row / pivot.sqrt()
            weight -= row * (weight[each, p].unsqueeze(1) / pivot)
            diagonal = torch.maximum(diagonal - factors[:, i].square(), floor)
            removed[each, p] = True
            room[each, group[p]] -= 1
        inverse.baddbmm_(factors.mT, factors, alpha=-1)
    return order, losses


def _reconstruct(weight: Weight, hessian: Hessian, mask: Mask) -> Weight:
    """The weights on `mask` that minimise tr((W - W^) H (W - W^)').

    The rows of what is removed are those of the identity in each system, so that all have one size.
    """
    change = (weight.where(~mask, 0) @ hessian).where(mask, 0)
    chunk = _chunk(weight.shape[1])
    for kept, part in zip(torch.split(mask, chunk), torch.split(change, chunk), strict=True):
        system = hessian * (kept.unsqueeze(1) & kept.unsqueeze(2))
        system.diagonal(dim1=1, dim2=2).masked_fill_(~kept, 1)
        factor = torch.linalg.cholesky(system)
        part.copy_(torch.cholesky_solve(part.unsqueeze(2), factor).squeeze(2))
    return (weight + change).where(mask, 0)
