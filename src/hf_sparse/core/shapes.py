"""Tensors of one layer that many functions take: what they are and which shape they have."""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Weight: TypeAlias = Float[Tensor, "out in"]
Mask: TypeAlias = Bool[Tensor, "out in"]  # True = kept
Hessian: TypeAlias = Float[Tensor, "in in"]  # of the layer's inputs

BLOCK_WEIGHTS = 1 << 18


def row_blocks(shape: tuple[int, int], device: torch.device) -> list[slice]:
    """Rows of a weight to work on at once.

    On a CPU, blocks of 2^18 weights keep temporaries in the cache, where an operation over the
    whole weight waits for new pages of memory; elsewhere every block would cost launches.
    """
    rows, columns = shape
    step = max(1, BLOCK_WEIGHTS // max(1, columns)) if device.type == "cpu" else max(1, rows)
    return [slice(start, start + step) for start in range(0, rows, step)]
