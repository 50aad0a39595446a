"""Does Triton run here? It needs a C compiler when it launches its first kernel, and must know the
GPU; the ways to find out beforehand all leave something out, so a small product is made."""

from __future__ import annotations

import functools
import importlib.util

import torch

from ...core.logging import get_logger
from .pack import pack_dense
from .weight import GROUP

logger = get_logger(__name__)


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why kernels don't run on a device, which is logged once; None if they do."""
    if importlib.util.find_spec("triton") is None:
        return "needs triton (pip install triton)"
    from .triton_product import product

    ones = torch.ones(1, GROUP, device=device)
    try:
        works = product(ones, pack_dense(ones)).item() == GROUP
        reason = "its product of ones is wrong"
    except Exception as error:  # Triton's, a compiler's, the driver's: dense products need none
        works, reason = False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if works:
        return None
    logger.warning("triton's kernels don't run on %s and are left out: %s", device, reason)
    return f"triton doesn't run here: {reason}"
