"""Dense weights, or codes, packed into the sliced layout."""

from __future__ import annotations

import torch
from torch import Tensor

from .weight import (
    ANCHORS,
    FLOATS,
    GROUP,
    INT4,
    LANES,
    MAX_ENTRIES,
    UNIT,
    WARPS,
    WIDTHS,
    WINDOW_WEIGHTS,
    SlicedWeight,
    even_column,
)

WARPS_TO_FILL = 2048  # 16 on each multiprocessor of an H200; with few rows, rows are split more
SHORTEST_SEGMENT = 2  # units


def pack_dense(
    weight: Tensor, scales: Tensor | None = None, group_size: int | None = None
) -> SlicedWeight:
    """Pack a dense (out, in) weight, or int8 codes with `scales` (out, groups of columns).

    Codes of -8 to 7 are held in 4 bits. Works where the weight is; needs some ten times the memory
    of a window of rows.

    Raises:
        ValueError: the dtype is not one of `FLOATS` or int8, or there are too many entries.
    """
    rows, columns = weight.shape
    if weight.dtype not in (*FLOATS, torch.int8) or (weight.dtype == torch.int8) != (
        scales is not None
    ):
        raise ValueError(f"a weight in {weight.dtype} with scales {scales is not None}")
    padded = -(-columns // GROUP) * GROUP
    slots = -(-rows // LANES) * LANES
    window = _window(rows, padded)
    parts = [weight[start : start + window] for start in range(0, rows, window)]
    width = _best_width(parts, 4 if _is_narrow(weight) else 8 * weight.element_size())
    listed = torch.cat([_listed(part != 0, width).sum(dim=1) for part in parts])
    order, groups = _slices(listed, slots, window)
    if int(groups.sum()) * LANES * GROUP >= MAX_ENTRIES:
        raise ValueError(f"{rows} x {columns} has more than {MAX_ENTRIES} entries")
    units = -(-groups // UNIT)
    most = int(units.max())
    per_slice = WARPS_TO_FILL * LANES // slots
    warps = WARPS[0] if per_slice <= WARPS[0] else WARPS[1]
    segment_units = max(SHORTEST_SEGMENT, -(-most // max(warps, per_slice)))
    segments = -(-units // segment_units)
    table = torch.zeros(len(groups) + 1, 3, dtype=torch.int64, device=weight.device)
    table[1:] = torch.stack([groups, units, segments], dim=1).cumsum(dim=0)
    total = table[-1].tolist()
    values = weight.new_zeros(total[0], LANES, GROUP)
    gaps = torch.zeros(total[1] * UNIT, LANES, GROUP, dtype=torch.uint8, device=weight.device)
    anchors = torch.zeros(total[2], LANES, dtype=torch.int32, device=weight.device)
    # Lanes without a row hold the shortest one once more: an anchor of zeros alone takes 16 bits.
    source = order.clone()
    source[rows:] = order[rows - 1]
    for index, part in enumerate(parts):
        first = index * window // LANES
        lanes = source[first * LANES : (first + -(-len(part) // LANES)) * LANES] - index * window
        dense = torch.nn.functional.pad(part, (0, padded - columns))[lanes]
        _fill(dense, table[first : first + len(lanes) // LANES + 1], width, segment_units,
              values, gaps, anchors)  # fmt: skip
    tiled = None
    if scales is not None:
        tiled = torch.ones(slots + 1, scales.shape[1], device=weight.device)
        tiled[:rows] = scales
        tiled = tiled[order].T.contiguous()
    narrow = _is_narrow(weight)
    return SlicedWeight(
        (rows, columns),
        INT4 if narrow else weight.dtype,
        width,
        segment_units,
        warps,
        max(1, -(-int(segments.max()) // warps)),
        window,
        (group_size or columns) if scales is not None else 0,
        _join_nibbles(values) if narrow else values,
        _pack_gaps(gaps.view(-1, UNIT, LANES, GROUP), width),
        _narrowed(anchors),
        table.int(),
        order.int(),
        tiled,
    )


def _window(rows: int, padded: int) -> int:
    """Rows of a window: whole slices, and whole tiles of a dense product where there is room."""
    room = max(1, WINDOW_WEIGHTS // padded)
    step = LANES * 8 if room >= LANES * 8 else LANES
    return min(max(room // step * step, LANES), -(-rows // LANES) * LANES)


def _is_narrow(weight: Tensor) -> bool:
    if weight.dtype != torch.int8:
        return False
    low, high = (int(code) for code in weight.aminmax())
    return low >= -8 and high <= 7


def _distances(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How far each position is behind the last kept one, and which lie before a later kept one."""
    index = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device)
    last = index.where(mask, -1).cummax(dim=1).values
    return index - last, index < last[:, -1:]


def _best_width(parts: list[Tensor], value_bits: int) -> int:
    """The width that takes the fewest bits: narrow gaps call for more zeros to bridge long ones."""
    bits = dict.fromkeys(WIDTHS, 0)
    for part in parts:
        kept = int(torch.count_nonzero(part))
        distance, before = _distances(part != 0)
        for width in WIDTHS:
            bridges = ((distance % (1 << width) == 0) & (distance > 0) & before).sum()
            bits[width] += (kept + int(bridges)) * (value_bits + width)
    return min(WIDTHS, key=bits.__getitem__)


def _listed(mask: Tensor, width: int) -> Tensor:
    """Kept positions, and as many zeros between them as it takes to keep gaps below 2^width."""
    distance, before = _distances(mask)
    return mask | ((distance % (1 << width) == 0) & (distance > 0) & before)


def _slices(listed: Tensor, slots: int, window: int) -> tuple[Tensor, Tensor]:
    """The row of each lane, longest rows of a window first, and the groups of each slice."""
    rows = len(listed)
    order = torch.full((slots,), rows, device=listed.device)
    for start in range(0, rows, window):
        part = listed[start : start + window]
        order[start : start + len(part)] = part.argsort(descending=True, stable=True) + start
    lengths = torch.cat([listed, listed.new_zeros(1)])[order]
    return order, -(-lengths.view(-1, LANES).amax(dim=1) // GROUP)


def _fill(
    dense: Tensor,
    table: Tensor,
    width: int,
    segment_units: int,
    values: Tensor,
    gaps: Tensor,
    anchors: Tensor,
) -> None:
    """Write the entries of whole slices, `dense` in the order of their lanes."""
    device = dense.device
    lanes = torch.arange(len(dense), device=device)
    lengths = ((table[1:, 0] - table[:-1, 0]) * GROUP).repeat_interleave(LANES)
    listed = _listed(dense != 0, width)
    # The zeros that bring a row to its slice's length: the first that are not listed.
    room = (lengths - listed.sum(dim=1)).unsqueeze(1)
    listed |= ~listed & ((~listed).cumsum(dim=1) <= room)
    row, column = listed.nonzero(as_tuple=True)
    begin = lengths.cumsum(dim=0) - lengths
    entry = torch.arange(len(row), device=device) - begin[row]
    before = torch.cat([column.new_full((1,), -1), column[:-1]]).where(entry > 0, -1)
    lane, place = lanes[row] % LANES, table[:-1][row // LANES]
    group, inside = entry // GROUP, entry % GROUP
    values[place[:, 0] + group, lane, inside] = dense[row, column]
    size = segment_units * UNIT * GROUP
    starts = entry % size == 0
    gap = (column - before - 1).where(~starts, column & ((1 << width) - 1))
    gaps[place[:, 1] * UNIT + group, lane, inside] = gap.to(torch.uint8)
    even = even_column(group[starts], lengths[row[starts]] // GROUP, dense.shape[1])
    anchor = (column[starts] >> width) - (even >> width)
    anchors[(place[:, 2] + entry // size)[starts], lane[starts]] = anchor.int()


def _narrowed(anchors: Tensor) -> Tensor:
    """In the smallest type that holds them."""
    low, high = (int(anchor) for anchor in anchors.aminmax()) if anchors.numel() else (0, 0)
    for dtype in ANCHORS:
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            break
    return anchors.to(dtype)


def _pack_gaps(gaps: Tensor, width: int) -> Tensor:
    """[units, 4, 32, 8] to int32[units, width, 32]."""
    shifts = width * torch.arange(GROUP, device=gaps.device)
    strings = (gaps.long() << shifts).sum(dim=3)
    words = torch.zeros(len(gaps), width, LANES, dtype=torch.int64, device=gaps.device)
    for word in range(width):
        for part in range(UNIT):
            shift = width * GROUP * part - 32 * word
            if -width * GROUP < shift < 32:
                string = strings[:, part]
                words[:, word] |= string << shift if shift >= 0 else string >> -shift
    words &= 0xFFFFFFFF
    return words.where(words < 1 << 31, words - (1 << 32)).int()


def _join_nibbles(codes: Tensor) -> Tensor:
    """int8[..., 8] of -8 to 7 to int32[...]."""
    shifts = 4 * torch.arange(GROUP, device=codes.device)
    words = ((codes.long() & 15) << shifts).sum(dim=-1)
    return words.where(words < 1 << 31, words - (1 << 32)).int()
