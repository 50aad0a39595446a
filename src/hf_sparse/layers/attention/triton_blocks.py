"""The Triton kernel of attention over chosen blocks of keys, for NVIDIA GPUs.

A program takes some rows of a query block and walks through the keys of that block's list, with
running sums in fp32: no scores are held (Dao et al. 2022, "FlashAttention", algorithm 1).
Triton's interpreter runs it on a CPU (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inputs import Inputs, Part

# Of one program: rows, and keys of a step, by bytes of a number, so that sums stay in registers.
TILES = {2: (64, 32), 4: (16, 16)}


@triton.jit
def _attend(
    queries,
    keys,
    values,
    blocks,
    widths,
    valid,
    allowed,
    shifts,
    weights,
    totals,
    rows,
    key_count,
    slots,
    masked,
    query_blocks,
    groups,
    channels,
    value_channels,
    STEP: tl.constexpr,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Programs are (streams, query blocks, parts of ROWS rows of a block)."""
    stream = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    inside = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    row = block * STEP * groups + inside
    there = (inside < STEP * groups) & (row < rows)
    at = stream * rows + row
    channel = tl.arange(0, CHANNELS)
    value_channel = tl.arange(0, VALUE_CHANNELS)
    query = tl.load(
        queries + at[:, None] * channels + channel[None, :],
        mask=there[:, None] & (channel < channels)[None, :],
        other=0.0,
    )
    shift = tl.full([ROWS], -3.4e38, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, VALUE_CHANNELS], tl.float32)
    listed = (stream * query_blocks + block) * slots
    width = tl.load(widths + stream * query_blocks + block)
    for start in range(0, width * SIZE, KEYS):
        column = start + tl.arange(0, KEYS)
        known = column < width * SIZE
        chosen = tl.load(blocks + listed + column // SIZE, mask=known, other=0)
        key = stream * key_count + chosen * SIZE + column % SIZE
        seen = tl.load(valid + key, mask=known, other=0) != 0
        key_rows = tl.load(
            keys + key[:, None] * channels + channel[None, :],
            mask=seen[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
        scores = tl.dot(query, tl.trans(key_rows), input_precision="tf32x3")
        pairs = seen[None, :] & there[:, None]
        if start < masked:
            mask_row = (stream * query_blocks + block) * STEP + inside // groups
            pairs &= (
                tl.load(
                    allowed + mask_row[:, None] * masked + column[None, :],
                    mask=there[:, None] & (column < masked)[None, :],
                    other=1,
                )
                != 0
            )
        scores = tl.where(pairs, scores, float("-inf"))
        highest = tl.maximum(shift, tl.max(scores, axis=1))
        share = tl.exp(scores - highest[:, None])
        fade = tl.exp(shift - highest)
        found = tl.load(
            values + key[:, None] * value_channels + value_channel[None, :],
            mask=seen[:, None] & (value_channel < value_channels)[None, :],
            other=0.0,
        )
        weight = weight * fade + tl.sum(share, axis=1)
        total = total * fade[:, None] + tl.dot(
            share.to(found.dtype), found, input_precision="tf32x3"
        )
        shift = highest
    tl.store(shifts + at, shift, mask=there)
    tl.store(weights + at, weight, mask=there)
    tl.store(
        totals + at[:, None] * value_channels + value_channel[None, :],
        total,
        mask=there[:, None] & (value_channel < value_channels)[None, :],
    )


def block_part(inputs: Inputs, blocks: Tensor) -> Part:
    """`attend.block_part` without dropout and gradients.

    Args:
        inputs: of the call.
        blocks: key blocks of each query block, as of a `Selection`.
    """
    there = blocks >= 0
    partial = inputs.part.gather(2, blocks.clamp(min=0)) & there
    allowed = _allowed(inputs, blocks, int(partial.sum(dim=2).max()))
    streams, rows, channels = inputs.queries.shape
    wide = inputs.values.shape[2]
    shift = torch.empty(streams, rows, dtype=torch.float32, device=inputs.queries.device)
    weight, total = torch.empty_like(shift), shift.new_empty(streams, rows, wide)
    rows_of_one, keys_of_one = TILES[inputs.queries.element_size()]
    grid = streams, inputs.query_blocks, triton.cdiv(inputs.step * inputs.groups, rows_of_one)
    with torch.cuda.device_of(inputs.queries):
        _attend[grid](
            inputs.queries.contiguous(), inputs.keys, inputs.values, blocks.contiguous(),
            there.sum(dim=2, dtype=torch.int32), inputs.valid.to(torch.int8),
            allowed, shift, weight, total, rows, inputs.keys.shape[1], blocks.shape[2],
            allowed.shape[3], inputs.query_blocks, inputs.groups, channels, wide,
            STEP=inputs.step, SIZE=inputs.size, CHANNELS=_power(channels),
            VALUE_CHANNELS=_power(wide), ROWS=rows_of_one, KEYS=keys_of_one, num_stages=2,
        )  # fmt: skip
    return Part(shift, weight, total)


def _allowed(inputs: Inputs, blocks: Tensor, first: int) -> Tensor:
    """May queries attend to the keys of the first so many of their blocks? Of those alone it isn't
    known; (streams, query blocks, queries, keys) as int8."""
    device, within = blocks.device, torch.arange(inputs.size, device=blocks.device)
    keys = (blocks[..., :first].clamp(min=0)[..., None] * inputs.size + within).flatten(2)
    # What fills up the last blocks is no query, and no valid key.
    keys = keys.clamp(max=inputs.mask.kv_length - 1)[:, :, None]
    numbers = torch.arange(inputs.query_blocks * inputs.step, device=device)
    query = numbers.clamp(max=inputs.mask.q_length - 1).view(-1, inputs.step, 1)
    allowed = inputs.mask.allowed(inputs.batch[:, None, None, None], query, keys)
    shape = (inputs.streams, inputs.query_blocks, inputs.step, keys.shape[3])
    return allowed.expand(shape).to(torch.int8).contiguous()


def _power(channels: int) -> int:
    """Of two, as Triton's products take them."""
    return max(16, 1 << (channels - 1).bit_length())
