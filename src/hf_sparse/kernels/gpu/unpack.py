"""A weight in the sliced layout back to its dense form, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .weight import GROUP, INT4, LANES, UNIT, WINDOW_WEIGHTS, SlicedWeight, even_column


def entry_columns(weight: SlicedWeight) -> Iterator[tuple[slice, Tensor]]:
    """Columns of the entries, int64[groups, 32, 8], some slices at a time with their groups."""
    table = weight.slices.to("cpu", torch.int64)
    step = max(1, WINDOW_WEIGHTS // 8 // (LANES * weight.padded))
    for first in range(0, len(table) - 1, step):
        part = table[first : first + step + 1]
        yield slice(int(part[0, 0]), int(part[-1, 0])), _columns_of(weight, part)


def _columns_of(weight: SlicedWeight, table: Tensor) -> Tensor:
    """Of the slices whose rows of `slices`, and the next one, are given."""
    device = weight.gaps.device
    counts = table[1:] - table[:-1]
    groups = counts[:, 0]
    owner = torch.arange(len(groups)).repeat_interleave(groups)
    inside = torch.arange(int(groups.sum())) - (table[:-1, 0] - table[0, 0])[owner]
    unit = (table[:-1, 1][owner] + inside // UNIT).to(device)
    segment_groups = UNIT * weight.segment_units
    segment = (table[:-1, 2][owner] + inside // segment_groups).to(device)
    even = even_column(inside // segment_groups * segment_groups, groups[owner], weight.padded)
    start = torch.arange(len(owner)) - inside % segment_groups
    gaps = _unpack_gaps(weight.gaps[int(table[0, 1]) : int(table[-1, 1])], weight.width)
    gaps = gaps[unit - int(table[0, 1]), (inside % UNIT).to(device)] + 1
    ends = gaps.cumsum(dim=2)
    total = ends[:, :, -1].cumsum(dim=0) - ends[:, :, -1]
    anchor = weight.anchors[segment].long() + (even >> weight.width).unsqueeze(1).to(device)
    base = (anchor << weight.width) + total - total[start.to(device)]
    return base.unsqueeze(2) + ends - 1


def codes(weight: SlicedWeight) -> Tensor:
    """The dense weight's values, codes without their scales in int8; shape (out, in)."""
    rows, columns = weight.shape
    values = _nibbles(weight.values) if weight.dtype == INT4 else weight.values
    dense = values.new_zeros(rows + 1, weight.padded)
    table = weight.slices.to("cpu", torch.int64)
    counts = (table[1:, 0] - table[:-1, 0]).to(values.device)
    owner = torch.arange(len(counts), device=values.device).repeat_interleave(counts)
    rows_of = weight.order.long().view(-1, LANES)
    for groups, found in entry_columns(weight):
        lines = rows_of[owner[groups]].unsqueeze(2).expand_as(found)
        dense[lines, found] = values[groups]
    return dense[:rows, :columns].contiguous()


def row_scales(weight: SlicedWeight) -> Tensor:
    """The scales as (out, column groups)."""
    assert weight.scales is not None
    rows = weight.shape[0]
    found = weight.scales.new_empty(rows + 1, len(weight.scales))
    found[weight.order.long()] = weight.scales.T
    return found[:rows].contiguous()


def dense(weight: SlicedWeight, dtype: torch.dtype) -> Tensor:
    """The dense weight in `dtype`, scales applied, shape (out, in)."""
    values, columns = codes(weight), weight.shape[1]
    if weight.scales is None:
        return values.to(dtype)
    scale = row_scales(weight).repeat_interleave(min(weight.group_size, columns), dim=1)
    return (values.float() * scale[:, :columns]).to(dtype)


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
