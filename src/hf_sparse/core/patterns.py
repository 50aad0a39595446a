"""Sparsity patterns: the one place where scores become a mask.

A mask is a bool tensor of the weight's shape, True = kept. Counts are exact: a pattern removes
`floor(sparsity * n)` of n weights whatever the ties, computed with the decimal value of the
sparsity that was written (0.29 of 100 is 29, although 0.29 * 100 < 29 in binary floating point).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from . import counting
from .counting import at_most, count_true, count_true_per_row
from .errors import ConfigError
from .shapes import row_blocks
from .untrusted_text import brief

# Scores in a row up to which all pairs are compared.
SHORT_ROW = 32


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go; `sparsity` is the fraction of zeros, 0 <= sparsity < 1."""

    sparsity: float

    def __str__(self) -> str:
        return "unstructured"

    def zeros(self, n: int) -> int:
        """Number of zeros among n weights: floor(sparsity * n)."""
        return math.floor(Fraction(str(self.sparsity)) * n)

    def mask(
        self, scores: Float[Tensor, "out in"], *, per_row: bool = False
    ) -> Bool[Tensor, "out in"]:
        """Keep the highest scores: over the whole matrix, or within each output row."""
        if per_row:
            return keep_highest(scores, self.zeros(scores.shape[1]))
        return keep_highest(scores.reshape(1, -1), self.zeros(scores.numel())).view_as(scores)

    def column_zeros(self, rows: int, start: int, end: int) -> int:
        """Zeros that columns start..end of a matrix take, so that all columns add up exactly."""
        return self.zeros(rows * end) - self.zeros(rows * start)


@dataclass(frozen=True)
class NM:
    """n kept of every m consecutive inputs of a row.

    A ragged tail of t < m inputs keeps ceil(n * t / m).
    """

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in a full group: 1 - n/m."""
        return float(1 - Fraction(self.n, self.m))

    def kept(self, width: int) -> int:
        """Weights kept in a group of `width` <= m inputs."""
        return -(-self.n * width // self.m)

    def mask(
        self, scores: Float[Tensor, "out in"], *, per_row: bool = False
    ) -> Bool[Tensor, "out in"]:
        """Keep the n highest scores of each group; groups lie within rows, so per_row is moot."""
        rows, columns = scores.shape
        tail = columns % self.m
        full = scores[:, : columns - tail].reshape(-1, self.m)
        kept = keep_highest(full, self.m - self.n).view(rows, columns - tail)
        if not tail:
            return kept
        last = keep_highest(scores[:, columns - tail :], tail - self.kept(tail))
        return torch.cat([kept, last], dim=1)


Pattern: TypeAlias = Unstructured | NM


def parse_pattern(text: object, sparsity: float) -> Pattern:
    """`"unstructured"` or `"n:m"` to a pattern.

    Raises:
        ConfigError: the text is neither, or n:m does not satisfy 1 <= n < m.
    """
    if text == "unstructured":
        return Unstructured(sparsity)
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(
            f"pattern={brief(text)} is not known: pass 'unstructured' or 'n:m' (n kept of m), e.g. "
            "'2:4'"
        )
    n, m = int(match[1]), int(match[2])
    if not 1 <= n < m:
        raise ConfigError(
            f"pattern={text!r} keeps {n} of {m} weights: n:m needs 1 <= n < m (n is the number "
            f"kept)" + (f"; did you mean '{m}:{n}'?" if 1 <= m < n else "")
        )
    return NM(n, m)


def partial_mask(
    pattern: Pattern,
    scores: Float[Tensor, "out in"],
    share: float | Fraction,
    *,
    per_row: bool = False,
) -> Bool[Tensor, "out in"]:
    """The pattern's mask, of whose zeros only those of the lowest scores are there yet.

    Args:
        pattern: the final one; no weight is dropped on the way that an n:m mask would keep.
        scores: as for the pattern's `mask`.
        share: 0 to 1, how many of the pattern's zeros are there: the floor of it, of each row's
            zeros or of all.
        per_row: choose within each output row.
    """
    final = pattern.mask(scores, per_row=per_row)
    if share >= 1:
        return final
    candidates = scores.masked_fill(final, math.inf)
    rows = candidates if per_row else candidates.reshape(1, -1)
    zeros = (final.numel() - count_true(final)) // max(1, len(rows))
    return keep_highest(rows, math.floor(share * zeros)).view_as(scores)


def keep_highest(scores: Float[Tensor, "rows n"], drop: int) -> Bool[Tensor, "rows n"]:
    """True except for the `drop` lowest scores of each row; of equal scores the earlier go first.

    A threshold alone would remove every tie with it; what is left to remove among the ties is
    counted out, so the number of zeros is exact.
    """
    if drop == 0 or scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    found = counting.keep_highest(scores, drop)
    if found is not None:
        return found
    if scores.shape[1] <= SHORT_ROW:
        blocks = row_blocks((len(scores), scores.shape[1]), scores.device)
        return torch.cat([_ranks(scores[rows]) >= drop for rows in blocks])
    threshold = _kth_smallest(scores, drop)
    dropped = at_most(scores, threshold)
    if count_true(dropped) != drop * len(dropped):
        below = at_most(scores, threshold.nextafter(threshold.new_tensor(-math.inf)))
        _keep_last_ties(dropped, below, drop)
    return dropped.logical_not_()


def _keep_last_ties(
    dropped: Bool[Tensor, "rows n"], below: Bool[Tensor, "rows n"], drop: int
) -> None:
    """Of the scores equal to each row's threshold only the first go; `dropped` changes in place.

    Args:
        dropped: the scores at most equal to the threshold.
        below: those below it.
        drop: how many of a row go.
    """
    rows, columns = (dropped ^ below).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(dropped))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(dim=0) - counts)[rows]
    stays = place >= (drop - count_true_per_row(below))[rows]
    dropped[rows[stays], columns[stays]] = False


def _ranks(scores: Float[Tensor, "rows n"]) -> UInt8[Tensor, "rows n"]:
    """Each score's place in its row, counted from the lowest, by comparing all pairs of columns:
    for the short rows of n:m several times as fast as selecting. Of equal scores the earlier has
    the lower place."""
    columns = scores.T.contiguous()
    ranks = torch.zeros_like(columns, dtype=torch.uint8)
    for i in range(1, len(columns)):
        below = columns[i] < columns[:i]
        ranks[:i] += below
        ranks[i] += (i - below.sum(dim=0)).to(torch.uint8)
    return ranks.T


def _kth_smallest(scores: Float[Tensor, "rows n"], k: int) -> Float[Tensor, "rows 1"]:
    """Each row's k-th smallest score. For long rows on a CPU numpy is 15 times as fast as torch; on
    a GPU torch selects with one block of threads a row, and sorts a single long row with all."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        ordered = np.partition(scores.numpy(), k - 1, axis=1)
        return torch.from_numpy(ordered[:, k - 1 : k])
    if scores.is_cuda and len(scores) == 1:
        return scores.sort(dim=1).values[:, k - 1 : k]
    return scores.kthvalue(k, dim=1, keepdim=True).values
