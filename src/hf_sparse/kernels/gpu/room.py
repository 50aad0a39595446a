"""May a dense weight take the packed one's place in a GPU's memory?"""

from __future__ import annotations

import math

import torch

from ..base import Stored

FREE_SHARE = 0.25  # of the GPU's memory that dense weights must leave free: for the cache, say


def dense_cost(stored: Stored) -> str | None:
    """Why the dense weight can't stand beside the rest on its GPU; None if it can."""
    needed = math.prod(stored.shape) * stored.dtype.itemsize
    free, total = torch.cuda.mem_get_info(stored.device)
    # What torch holds and uses no more, as after measuring, is free, too.
    free += torch.cuda.memory_reserved(stored.device) - torch.cuda.memory_allocated(stored.device)
    if free - needed >= FREE_SHARE * total:
        return None
    return (
        f"a dense weight would take {needed >> 20} MB, "
        f"{free >> 20} of {total >> 20} MB are free and {FREE_SHARE:.0%} must stay so"
    )
