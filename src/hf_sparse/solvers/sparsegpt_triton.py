"""SparseGPT's loop over the columns of a block, as one kernel.

In torch every column costs several launches of a few microseconds, for work that takes less. Here a
program keeps some rows of the block in registers, decides on the masks of n:m groups when it
reaches them, and passes each column's errors on to those behind it.

Triton's interpreter runs it on a CPU (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # of a program, at most
WEIGHTS = 4096  # of a program: more would spill out of the registers where rows are not aligned
WARPS = 8


@triton.jit
def _solve_block(
    weights,
    kept,
    errors,
    upper,
    dead,
    rows,
    width,
    tail_drop,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    DROP: tl.constexpr,
):
    """weights, kept, errors are [width, rows], upper [width, width]; GROUP 0: the mask is given."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = column[:, None] * rows + row[None, :]
    inside = (column < width)[:, None] & (row < rows)[None, :]
    w = tl.load(weights + at, mask=inside, other=0.0)
    if GROUP == 0:
        keep = tl.load(kept + at, mask=inside, other=1).to(tl.int32)
    else:
        keep = tl.full((BLOCK, ROWS), 1, tl.int32)
        diagonal = tl.load(upper + column * (width + 1), mask=column < width, other=1.0)
        alive = tl.load(dead + column, mask=column < width, other=0) == 0
    for i in range(width):
        if GROUP > 0:
            if i % GROUP == 0:
                # As `patterns.keep_highest`: of equal scores the earlier is the lower.
                scores = tl.div_rn(w, diagonal[:, None] + tl.zeros_like(w))
                scores = tl.where(alive[:, None], scores * scores, 0.0)
                own = (column >= i) & (column < i + GROUP) & (column < width)
                rank = tl.zeros((BLOCK, ROWS), tl.int32)
                for k in range(i, tl.minimum(i + GROUP, width)):
                    other = tl.sum(tl.where((column == k)[:, None], scores, 0.0), axis=0)[None, :]
                    lower = (other < scores) | ((other == scores) & (column > k)[:, None])
                    rank += lower.to(tl.int32)
                drop = tl.where(i + GROUP <= width, DROP, tail_drop)
                keep = tl.where(own[:, None], (rank >= drop).to(tl.int32), keep)
        goes = (column == i)[:, None] & (keep == 0)
        scale = tl.div_rn(1.0, tl.load(upper + i * (width + 1)))
        error = tl.sum(tl.where(goes, w, 0.0), axis=0) * scale
        tl.store(errors + i * rows + row, error, mask=row < rows)
        factors = tl.load(
            upper + i * width + column, mask=(column > i) & (column < width), other=0.0
        )
        w -= factors[:, None] * error[None, :]
    tl.store(weights + at, tl.where(keep != 0, w, 0.0), mask=inside)
    if GROUP > 0:
        tl.store(kept + at, keep.to(tl.uint8), mask=inside)


def solve_block(
    weights: Tensor,
    kept: Tensor,
    upper: Tensor,
    dead: Tensor,
    group: int,
    drop: int,
    tail_drop: int,
) -> Tensor:
    """Prune a block of columns in place; the errors of each column, [block, out].

    Args:
        weights: [block, out], fp32, contiguous: columns of W as rows.
        kept: bool [block, out], contiguous; given if `group` is 0, else written.
        upper: the block's part of U, [block, block].
        dead: bool [block].
        group: m of n:m; 0 for a mask that is given.
        drop, tail_drop: zeros of a group, and of a last one that is shorter.
    """
    width, rows = weights.shape
    errors = torch.empty_like(weights)
    block = triton.next_power_of_2(width)
    own_rows = min(ROWS, WEIGHTS // block)
    with torch.cuda.device_of(weights):  # Triton launches on the current GPU
        _solve_block[(triton.cdiv(rows, own_rows),)](
            weights,
            kept.view(torch.uint8),
            errors,
            upper.contiguous(),
            dead.view(torch.uint8),
            rows,
            width,
            tail_drop,
            BLOCK=block,
            ROWS=own_rows,
            GROUP=group,
            DROP=drop,
            num_warps=WARPS,
        )
    return errors
