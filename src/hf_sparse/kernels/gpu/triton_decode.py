"""The Triton kernel that decodes a window of rows of the sliced layout to a dense matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_slices import constants, first_column, slice_of, tensors
from .weight import LANES, SlicedWeight


@triton.jit
def _decode_window(
    values,
    gaps,
    anchors,
    slices,
    order,
    scales,
    out,
    first_slice,
    first_row,
    slots,
    rows,
    columns,
    WIDTH: tl.constexpr,
    SEGMENT_UNITS: tl.constexpr,
    NIBBLES: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """out[row - first_row, column] of one segment of one slice; programs are (slices, segments)."""
    slice_ = first_slice + tl.program_id(0)
    segment = tl.program_id(1)
    first_group, first_unit, first_segment, groups = slice_of(slices, slice_)
    lane = tl.arange(0, 32)
    entry = tl.arange(0, 8)
    start = segment * SEGMENT_UNITS
    row = tl.load(order + slice_ * 32 + lane)
    anchor = tl.load(
        anchors + (first_segment + segment) * 32 + lane, mask=start * 4 + lane * 0 < groups, other=0
    )
    column = first_column(anchor, start, groups, tl.cdiv(columns, 8) * 8, WIDTH)
    line = (row - first_row).to(tl.int64) * columns
    if SCALED and GROUP_SIZE == 0:
        scale = tl.load(scales + slice_ * 32 + lane)[:, None]
    for group in range(start * 4, tl.minimum((start + SEGMENT_UNITS) * 4, groups)):
        # The 8 gaps of the group start at bit 8 WIDTH (group % 4) of the unit's words.
        at = 8 * WIDTH * (group % 4)
        words = gaps + (first_unit + group // 4) * WIDTH * 32 + lane
        low = tl.load(words + at // 32 * 32).to(tl.uint32, bitcast=True).to(tl.uint64)
        last = (at + 8 * WIDTH - 1) // 32
        high = tl.load(words + last * 32).to(tl.uint32, bitcast=True).to(tl.uint64)
        gap = ((low | (high << 32)) >> (at % 32).to(tl.uint64)).to(tl.uint32)
        gap = (gap[:, None] >> (WIDTH * entry)[None, :]) & ((1 << WIDTH) - 1)
        ends = tl.cumsum(gap.to(tl.int32) + 1, axis=1)
        place = column[:, None] + ends - 1
        column += tl.sum(gap.to(tl.int32) + 1, axis=1)
        if NIBBLES:
            word = tl.load(values + (first_group + group) * 32 + lane)
            found = ((word[:, None] << (28 - 4 * entry)[None, :]) >> 28).to(tl.float32)
        else:
            found = tl.load(
                values + ((first_group + group) * 32 + lane[:, None]) * 8 + entry[None, :]
            )
        if SCALED and GROUP_SIZE == 0:
            found = found.to(tl.float32) * scale
        elif GROUP_SIZE > 0:
            at = (place // GROUP_SIZE) * slots + slice_ * 32 + lane[:, None]
            found = found.to(tl.float32) * tl.load(scales + at, mask=place < columns, other=0.0)
        wanted = (row < rows)[:, None] & (place < columns)
        tl.store(out + line[:, None] + place, found.to(out.dtype.element_ty), wanted)


def windows(weight: SlicedWeight) -> list[tuple[int, int]]:
    """First and last row of each part that `decode_window` decodes at once."""
    rows, step = weight.shape[0], weight.window
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def decode_window(weight: SlicedWeight, first: int, last: int, out: Tensor) -> Tensor:
    """Rows first..last of the dense weight, one of `windows`, into `out` [>= last - first, in]."""
    dense = out[: last - first].zero_()
    start, end = first // LANES, -(-last // LANES)
    rows, columns = weight.shape
    with torch.cuda.device_of(out):
        _decode_window[(end - start, weight.warps * weight.splits)](
            *tensors(weight), dense, start, first, (len(weight.slices) - 1) * LANES, rows, columns,
            num_warps=1, **constants(weight),
        )  # fmt: skip
    return dense
