"""The sliced layout: what a GPU thread reads of a sparse weight.

Sliced ELLPACK (SELL-C-sigma, Kreutzer et al. 2014) with the columns as gaps. Rows of similar length
form slices of 32. Every row of a slice lists the same number of columns, in ascending order: its
non-zeros and, to make the numbers even and the gaps small, some zeros. A lane of a warp owns a row
and walks through its entries. Entry e of a row lies at column c_e = c_(e-1) + 1 + gap_e, c_-1 = -1,
with gaps of `width` bits.

    values   V[groups, 32, 8]           8 entries a lane: 16 bytes of bf16, 512 a warp, in one load
             int4: int32[groups, 32]    entry j of a group is nibble j, two's complement
    gaps     int32[units, width, 32]    a unit is 4 groups: 32 gaps of `width` bits, `width` words,
                                        one string with the lowest bit first
    anchors  int8, int16 or int32[segments, 32]
                                        where a row can be split, every `segment_units` units
    slices   int32[slices + 1, 3]       first group, unit and segment of each slice
    order    int32[slices * 32]         the row of each lane, or `out` where there is none
    scales   fp32[column groups, slices * 32], of codes only; `group_size` columns share one

A segment starts anew: the gap of its first entry are the lowest `width` bits of its column, and its
anchor the others, less those of a row whose entries lie evenly (`even_column`). So an anchor of a
weight pruned at random takes 8 bits.

Rows are sorted by length inside windows of `window` rows only (the sigma of SELL-C-sigma): the rows
of a window are a block of the weight, which can be decoded at once in front of a dense product.
Columns are counted up to `padded`, in rounded up to 8, so that a row can always be filled to a
whole group.

Bytes a weight at sparsity s: about (1 - s) (b + w / 8) for b-byte values and gaps of w bits, and 1
for every segment; a bit mask takes 1/8 more than (1 - s) b. The width is the one that takes least:
3 bits between 50 and 70 %.

Why not the bit mask itself, which is smaller at 50 %: the place of a value is then a population
count of the mask, for kept and pruned weights alike. Compiled for Hopper (Triton 3.7), a plain
kernel of that kind has 19 instructions for every position, ours 13 for every kept weight; and the
work falls with the sparsity as the bytes do. An H200's memory delivers some 14 positions a cycle
and multiprocessor at 50 %, which leaves 9 instructions for each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

LANES = 32  # rows of a slice
GROUP = 8  # entries of a row that lie side by side
UNIT = 4  # groups whose gaps share their words
WIDTHS = (2, 3, 4)  # bits of a gap
WINDOW_WEIGHTS = 1 << 24  # of a window, padded: 32 MB of bf16, about half of an H200's L2 cache
MOST_ROWS = 65535 * LANES  # as many slices as CUDA lets the second number of a grid be
MOST_SPLITS = 65535  # and the third
WARPS = (8, 16)  # of a program: segments of a row that it adds up
MAX_ENTRIES = 1 << 31

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
DTYPES = (*FLOATS, torch.int8, INT4)
ANCHORS = (torch.int8, torch.int16, torch.int32)
# What describes a weight beside its tensors; `dtype` by its place in DTYPES.
NUMBERS = (
    "out", "in", "dtype", "width", "segment_units", "warps", "splits", "window", "group_size",
)  # fmt: skip
TENSORS = ("values", "gaps", "anchors", "slices", "order", "scales")


@dataclass(frozen=True, eq=False)
class SlicedWeight:
    """A weight in the sliced layout; see the module's text for the tensors.

    A row's segments belong to the warps of `splits` programs, `warps` of each.

    `pack` makes valid ones. Tensors from elsewhere go through `check` before a kernel reads them.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    width: int
    segment_units: int
    warps: int
    splits: int
    window: int
    group_size: int
    values: Tensor
    gaps: Tensor
    anchors: Tensor
    slices: Tensor
    order: Tensor
    scales: Tensor | None = None

    @property
    def padded(self) -> int:
        """Columns, rounded up to a whole group."""
        return -(-self.shape[1] // GROUP) * GROUP

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}

    def copy(self) -> SlicedWeight:
        """The same in memory of its own."""
        copies: Any = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return replace(self, **copies)

    def numbers(self) -> tuple[int, ...]:
        """All but the tensors, as integers, in the order of `NUMBERS`."""
        rest: Any = (getattr(self, name) for name in NUMBERS[3:])
        return *self.shape, DTYPES.index(self.dtype), *rest


def even_column(group: Tensor, groups: Tensor, padded: int) -> Tensor:
    """The column of the first entry of a group if a row's entries lay evenly."""
    return group * padded // groups.clamp(min=1)
