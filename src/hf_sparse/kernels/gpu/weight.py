"""The sliced layout: what a GPU thread reads of a sparse weight, and how it is packed.

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
anchor the others, less those of a row whose entries lie evenly (`_even`). So an anchor of a weight
pruned at random takes 8 bits.

Rows change their order only inside a window of `window` rows, which is what is decoded at once in
front of a dense product. Columns are counted up to `padded`, in rounded up to 8, so that a row can
always be filled to a whole group.

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

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

LANES = 32  # rows of a slice
GROUP = 8  # entries of a row that lie side by side
UNIT = 4  # groups whose gaps share their words
WIDTHS = (2, 3, 4)  # bits of a gap
WINDOW_WEIGHTS = 1 << 24  # of a window, padded: 32 MB of bf16, about half of an H200's L2 cache
WARPS = (8, 16)  # of a program: segments of a row that it adds up
MAX_ENTRIES = 1 << 31

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
DTYPES = (*FLOATS, torch.int8, INT4)
ANCHORS = (torch.int8, torch.int16, torch.int32)


@dataclass(frozen=True, eq=False)
class SlicedWeight:
    """A weight in the sliced layout; see the module's text for the tensors.

    A row's segments belong to the warps of `splits` programs, `warps` of each.

    `sliced` makes valid ones. Tensors from elsewhere go through `check` before a kernel reads them.
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
        names = ("values", "gaps", "anchors", "slices", "order", "scales")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def copy(self) -> SlicedWeight:
        """The same in memory of its own."""
        copies: Any = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return replace(self, **copies)

    def numbers(self) -> tuple[int, ...]:
        """All but the tensors, as integers."""
        own = (
            self.width,
            self.segment_units,
            self.warps,
            self.splits,
            self.window,
            self.group_size,
        )
        return *self.shape, DTYPES.index(self.dtype), *own

    @staticmethod
    def of(numbers: tuple[int, ...], tensors: tuple[Tensor | None, ...]) -> SlicedWeight:
        """`numbers()` and the tensors put together again; a ValueError unless they fit."""
        rows, columns, dtype, *rest = numbers
        if not 0 <= dtype < len(DTYPES):
            raise ValueError(f"values of type {dtype}, expected a number below {len(DTYPES)}")
        weight = SlicedWeight((rows, columns), DTYPES[dtype], *rest, *tensors)  # type: ignore[arg-type]
        weight.check()
        return weight

    def check(self) -> None:
        """Prove that no kernel reads or writes out of bounds. Waits for the device.

        Raises:
            ValueError: names the tensor and what is wrong with it.
        """
        self._check_shapes()
        rows = self.shape[0]
        slices = self.slices.to("cpu", torch.int64)
        per_unit = torch.tensor([1, UNIT, UNIT * self.segment_units])
        groups = slices[1:, :1] - slices[:-1, :1]
        wanted = -(-groups // per_unit)
        if bool((groups < 0).any() | (slices[0] != 0).any()) or not torch.equal(
            slices[1:] - slices[:-1], wanted
        ):
            raise ValueError("slices: groups, units and segments do not follow from each other")
        most = self.warps * self.splits
        if bool((wanted[:, 2] > most).any()):
            raise ValueError(f"slices: a row has more than {most} segments")
        sizes = (len(self.values), len(self.gaps), len(self.anchors))
        if sizes != tuple(slices[-1].tolist()):
            raise ValueError(f"slices end at {slices[-1].tolist()}, the tensors at {sizes}")
        order = self.order.long()
        windows = order.view(-1, LANES).split(self.window // LANES)  # type: ignore[no-untyped-call]
        for index, part in enumerate(windows):
            first, last = index * self.window, min((index + 1) * self.window, rows)
            expected = torch.arange(first, last, device=order.device)
            found = part.flatten().sort().values
            if not (
                torch.equal(found[: len(expected)], expected)
                and bool((found[len(expected) :] == rows).all())
            ):
                raise ValueError(f"order: rows {first} to {last} do not occur once each")
        if any(bool(((c < 0) | (c >= self.padded)).any()) for _, c in self.columns()):
            raise ValueError(f"gaps or anchors lead beyond column {self.padded}")

    def _check_shapes(self) -> None:
        rows, columns = self.shape
        if (
            rows < 1
            or columns < 1
            or self.warps not in WARPS
            or min(self.segment_units, self.splits) < 1
            or self.width not in WIDTHS
        ):
            raise ValueError(
                f"a weight of {rows} x {columns} with gaps of {self.width} bits in segments of "
                f"{self.segment_units} units"
            )
        reach = self.segment_units * self.warps * self.splits * UNIT * GROUP
        if reach >= MAX_ENTRIES:
            raise ValueError(f"segments reach to entry {reach}, expected less than {MAX_ENTRIES}")
        if self.window < LANES or self.window % LANES:
            raise ValueError(f"window is {self.window}, expected a multiple of {LANES}")
        slots = -(-rows // LANES) * LANES
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "values": (self.dtype, (len(self.values), LANES, GROUP)),
            "gaps": (torch.int32, (len(self.gaps), self.width, LANES)),
            "anchors": (self.anchors.dtype, (len(self.anchors), LANES)),
            "slices": (torch.int32, (slots // LANES + 1, 3)),
            "order": (torch.int32, (slots,)),
        }
        if self.dtype == INT4:
            expected["values"] = (torch.int32, (len(self.values), LANES))
        if (self.scales is None) != (self.dtype in FLOATS):
            raise ValueError(f"scales belong to codes, these values are {self.dtype}")
        if self.scales is not None:
            if self.group_size < 1:
                raise ValueError(f"group_size is {self.group_size}, expected at least 1")
            expected["scales"] = (torch.float32, (-(-columns // self.group_size), slots))
        if self.anchors.dtype not in ANCHORS:
            raise ValueError(f"anchors are in {self.anchors.dtype}, expected one of {ANCHORS}")
        for name, (dtype, shape) in expected.items():
            tensor = getattr(self, name)
            found = tensor.dtype, tuple(tensor.shape)
            if found != (dtype, shape):
                raise ValueError(f"{name} is {found}, expected {(dtype, shape)}")
            if not tensor.is_contiguous() or tensor.device != self.values.device:
                raise ValueError(f"{name} must be contiguous and on {self.values.device}")

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns of the entries, int64[groups, 32, 8], some slices at a time with their groups."""
        table = self.slices.to("cpu", torch.int64)
        step = max(1, WINDOW_WEIGHTS // 8 // (LANES * self.padded))
        for first in range(0, len(table) - 1, step):
            part = table[first : first + step + 1]
            yield slice(int(part[0, 0]), int(part[-1, 0])), self._columns(part)

    def _columns(self, table: Tensor) -> Tensor:
        """Of the slices whose rows of `slices`, and the next one, are given."""
        device = self.gaps.device
        counts = table[1:] - table[:-1]
        groups = counts[:, 0]
        owner = torch.arange(len(groups)).repeat_interleave(groups)
        inside = torch.arange(int(groups.sum())) - (table[:-1, 0] - table[0, 0])[owner]
        unit = (table[:-1, 1][owner] + inside // UNIT).to(device)
        segment_groups = UNIT * self.segment_units
        segment = (table[:-1, 2][owner] + inside // segment_groups).to(device)
        even = _even(inside // segment_groups * segment_groups, groups[owner], self.padded)
        start = torch.arange(len(owner)) - inside % segment_groups
        gaps = _unpack_gaps(self.gaps[int(table[0, 1]) : int(table[-1, 1])], self.width)
        gaps = gaps[unit - int(table[0, 1]), (inside % UNIT).to(device)] + 1
        ends = gaps.cumsum(dim=2)
        total = ends[:, :, -1].cumsum(dim=0) - ends[:, :, -1]
        anchor = self.anchors[segment].long() + (even >> self.width).unsqueeze(1).to(device)
        base = (anchor << self.width) + total - total[start.to(device)]
        return base.unsqueeze(2) + ends - 1

    def codes(self) -> Tensor:
        """The dense weight's values, codes without their scales in int8; shape (out, in)."""
        rows, columns = self.shape
        values = _nibbles(self.values) if self.dtype == INT4 else self.values
        dense = values.new_zeros(rows + 1, self.padded)
        table = self.slices.to("cpu", torch.int64)
        counts = (table[1:, 0] - table[:-1, 0]).to(values.device)
        owner = torch.arange(len(counts), device=values.device).repeat_interleave(counts)
        rows_of = self.order.long().view(-1, LANES)
        for groups, found in self.columns():
            lines = rows_of[owner[groups]].unsqueeze(2).expand_as(found)
            dense[lines, found] = values[groups]
        return dense[:rows, :columns].contiguous()

    def row_scales(self) -> Tensor:
        """The scales as (out, column groups)."""
        assert self.scales is not None
        rows = self.shape[0]
        found = self.scales.new_empty(rows + 1, len(self.scales))
        found[self.order.long()] = self.scales.T
        return found[:rows].contiguous()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dense weight in `dtype`, scales applied, shape (out, in)."""
        codes = self.codes()
        if self.scales is None:
            return codes.to(dtype)
        scale = self.row_scales().repeat_interleave(self.group_size, dim=1)
        return (codes.float() * scale[:, : codes.shape[1]]).to(dtype)


def _even(group: Tensor, groups: Tensor, padded: int) -> Tensor:
    """The column of the first entry of a group if a row's entries lay evenly."""
    return group * padded // groups.clamp(min=1)


def _unpack_gaps(words: Tensor, width: int) -> Tensor:
    """`_pack_gaps` undone, int64."""
    bits = torch.arange(32, device=words.device)
    string = (words.unsqueeze(3) >> bits) & 1  # [units, width, 32 lanes, 32 bits]
    string = string.transpose(1, 2).reshape(len(words), LANES, UNIT, GROUP, width).long()
    gaps = (string << torch.arange(width, device=words.device)).sum(dim=4)
    return gaps.transpose(1, 2)


def _nibbles(words: Tensor) -> Tensor:
    """`_join_nibbles` undone."""
    shifts = 4 * torch.arange(GROUP, dtype=torch.int32, device=words.device)
    return (((words.unsqueeze(-1) >> shifts) << 28) >> 28).to(torch.int8)


def same_tensors(left: SlicedWeight, tensors: tuple[Any, ...]) -> bool:
    """Are these tensors, in the order of the fields, the very ones of the weight?"""
    own = (left.values, left.gaps, left.anchors, left.slices, left.order, left.scales)
    return all(
        (a is None) == (b is None) and (a is None or a.data_ptr() == b.data_ptr())
        for a, b in zip(own, tensors, strict=True)
    )
