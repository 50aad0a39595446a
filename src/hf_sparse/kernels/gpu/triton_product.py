"""The Triton kernel of the sliced layout for products of few tokens.

It takes up to `TOKENS` tokens at a time. A program is 8 or 16 warps on a slice of 32 rows; a warp
walks through one segment of the rows, a lane through one row of it: gaps and values come in wide
loads that the whole warp makes side by side, and the columns of the 32 lanes lie close together, so
that their elements of x share cache lines. Sums are in fp32. The warps' sums are added at the end
in a fixed order; where there are too few rows to fill the GPU, several programs share them and
write sums of their own, which torch adds up. No atomics: a result is the same every time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .triton_slices import constants, first_column, slice_of, tensors
from .weight import SlicedWeight

TOKENS = 8  # of one program: more would spill the products of a group out of the registers


@triton.jit
def _load_words(gaps, unit, lane, there, WIDTH: tl.constexpr):
    """The words of a unit's gaps; four of them, of which WIDTH are meant."""
    at = gaps + unit * WIDTH * 32 + lane
    w0 = tl.load(at, mask=there, other=0).to(tl.uint32, bitcast=True)
    w1 = tl.load(at + 32, mask=there, other=0).to(tl.uint32, bitcast=True)
    w2, w3 = w1, w1
    if WIDTH > 2:
        w2 = tl.load(at + 64, mask=there, other=0).to(tl.uint32, bitcast=True)
    if WIDTH > 3:
        w3 = tl.load(at + 96, mask=there, other=0).to(tl.uint32, bitcast=True)
    return w0, w1, w2, w3


@triton.jit
def _gaps_of_group(words, part: tl.constexpr, WIDTH: tl.constexpr):
    """The 8 gaps of a unit's group `part` as one number: bits 8 WIDTH part on of the words."""
    word: tl.constexpr = 8 * WIDTH * part // 32
    shift: tl.constexpr = 8 * WIDTH * part % 32
    found = words[word] >> shift
    if shift + 8 * WIDTH > 32:
        found |= words[word + 1] << (32 - shift)
    return found


@triton.jit
def _load_group(values, group, lane, there, NIBBLES: tl.constexpr):
    """The 8 values of a group as they are stored."""
    if NIBBLES:
        return tl.load(values + group * 32 + lane, mask=there, other=0)
    else:
        at = ((group * 32 + lane) * 8)[:, :, None] + tl.arange(0, 8)[None, None, :]
        return tl.load(values + at, mask=there[:, :, None], other=0)


@triton.jit
def _load_unit(
    values,
    gaps,
    first_group,
    first_unit,
    unit,
    groups,
    lane,
    WIDTH: tl.constexpr,
    NIBBLES: tl.constexpr,
):
    there = (unit * 4 < groups) & (lane >= 0)
    w0, w1, w2, w3 = _load_words(gaps, first_unit + unit, lane, there, WIDTH)
    group = unit * 4
    v0 = _load_group(values, first_group + group, lane, there, NIBBLES)
    v1 = _load_group(
        values, first_group + group + 1, lane, (group + 1 < groups) & (lane >= 0), NIBBLES
    )
    v2 = _load_group(
        values, first_group + group + 2, lane, (group + 2 < groups) & (lane >= 0), NIBBLES
    )
    v3 = _load_group(
        values, first_group + group + 3, lane, (group + 3 < groups) & (lane >= 0), NIBBLES
    )
    return w0, w1, w2, w3, v0, v1, v2, v3


@triton.jit
def _halves(a, size: tl.constexpr):
    """[rows, 32, size] to its even and odd entries, [rows, 32, size / 2] each."""
    return tl.split(a.reshape(a.shape[0], a.shape[1], size // 2, 2))


@triton.jit
def _spread(stored, NIBBLES: tl.constexpr):
    """The 8 values of a group as a tensor [rows, 32] each."""
    if NIBBLES:
        return (
            (stored << 28) >> 28,
            (stored << 24) >> 28,
            (stored << 20) >> 28,
            (stored << 16) >> 28,
            (stored << 12) >> 28,
            (stored << 8) >> 28,
            (stored << 4) >> 28,
            stored >> 28,
        )
    else:
        even, odd = _halves(stored, 8)
        e04, e26 = _halves(even, 4)
        e15, e37 = _halves(odd, 4)
        v0, v4 = tl.split(e04)
        v2, v6 = tl.split(e26)
        v1, v5 = tl.split(e15)
        v3, v7 = tl.split(e37)
        return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _product(
    x,
    values,
    gaps,
    anchors,
    slices,
    order,
    scales,
    out,
    rows,
    columns,
    padded,
    tokens,
    WIDTH: tl.constexpr,
    SEGMENT_UNITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    NIBBLES: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """out[split, token, row]: sums of one slice over the segments of a split.

    x is [token blocks, padded, TOKENS]; programs are (token blocks, slices, splits). GROUP_SIZE 0
    stands for one scale a row.
    """
    block = tl.program_id(0)
    slice_ = tl.program_id(1)
    split = tl.program_id(2)
    slots = tl.num_programs(1) * 32
    first_group, first_unit, first_segment, groups = slice_of(slices, slice_)
    lane = tl.arange(0, 32)[None, :]
    segment = split * SEGMENTS + tl.arange(0, SEGMENTS)[:, None]
    token = tl.arange(0, TOKENS)[None, None, :]
    slot = slice_ * 32 + lane
    start = segment * SEGMENT_UNITS
    there = (start * 4 < groups) & (lane >= 0)
    anchor = tl.load(anchors + (first_segment + segment) * 32 + lane, mask=there, other=0)
    column = first_column(anchor, start, groups, padded, WIDTH)
    own_x = x + block.to(tl.int64) * padded * TOKENS
    sums = tl.zeros((SEGMENTS, 32, TOKENS), tl.float32)
    first = split * SEGMENTS * SEGMENT_UNITS  # of the program's first warp, which has most to do
    steps = tl.minimum(tl.cdiv(groups, 4) - first, SEGMENT_UNITS)
    unit = start
    w0, w1, w2, w3, v0, v1, v2, v3 = _load_unit(
        values, gaps, first_group, first_unit, unit, groups, lane, WIDTH, NIBBLES
    )
    for step in range(steps):
        # The next unit is on its way while this one is added up; behind the segment there is none.
        after = tl.where(step + 1 < SEGMENT_UNITS, unit + 1, groups)
        n0, n1, n2, n3, m0, m1, m2, m3 = _load_unit(
            values, gaps, first_group, first_unit, after, groups, lane, WIDTH, NIBBLES
        )
        words = (w0, w1, w2, w3)
        stored = (v0, v1, v2, v3)
        for part in tl.static_range(4):
            inside = (unit * 4 + part < groups) & (lane >= 0)
            gap = _gaps_of_group(words, part, WIDTH)
            found = _spread(stored[part], NIBBLES)
            for entry in tl.static_range(8):
                column += ((gap >> (WIDTH * entry)) & ((1 << WIDTH) - 1)).to(tl.int32)
                value = found[entry].to(tl.float32)
                if GROUP_SIZE > 0:
                    at = (column // GROUP_SIZE) * slots + slot
                    own = inside
                    if GROUP_SIZE % 8 != 0:  # columns that only pad a row may have no scale
                        own = inside & (column < columns)
                    value *= tl.load(scales + at, mask=own, other=0.0)
                at = (column * TOKENS)[:, :, None] + token
                taken = tl.load(own_x + at, mask=inside[:, :, None], other=0.0)
                sums += value[:, :, None] * taken.to(tl.float32)
                column += 1
        unit = after
        w0, w1, w2, w3, v0, v1, v2, v3 = n0, n1, n2, n3, m0, m1, m2, m3
    total = tl.sum(sums, axis=0)
    lane = tl.arange(0, 32)
    token = block * TOKENS + tl.arange(0, TOKENS)
    slot = slice_ * 32 + lane
    row = tl.load(order + slot)
    if SCALED and GROUP_SIZE == 0:
        total *= tl.load(scales + slot)[:, None]
    at = (split * tokens + token)[None, :].to(tl.int64) * rows + row[:, None]
    tl.store(
        out + at, total.to(out.dtype.element_ty), (row < rows)[:, None] & (token < tokens)[None, :]
    )


def product(x: Tensor, weight: SlicedWeight) -> Tensor:
    """x W' for x [tokens, in], in x's dtype. Meant for few tokens."""
    tokens, rows = len(x), weight.shape[0]
    block = min(triton.next_power_of_2(max(tokens, 1)), TOKENS)
    blocks = -(-tokens // block)
    if tokens == 1 and weight.padded == weight.shape[1]:
        own = x.contiguous()
    else:
        padding = (0, weight.padded - weight.shape[1], 0, blocks * block - tokens)
        own = F.pad(x, padding).view(blocks, block, -1).transpose(1, 2).contiguous()
    splits = weight.splits
    dtype = x.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, tokens, rows, dtype=dtype, device=x.device)
    slices = len(weight.slices) - 1
    if tokens:
        with torch.cuda.device_of(x):  # Triton launches on the current GPU, whatever the tensors'
            _product[(blocks, slices, splits)](
                own, *tensors(weight), out, *weight.shape, weight.padded, tokens,
                SEGMENTS=weight.warps, TOKENS=block, num_warps=weight.warps,
                **constants(weight),
            )  # fmt: skip
    return out[0] if splits == 1 else out.sum(dim=0).to(x.dtype)
