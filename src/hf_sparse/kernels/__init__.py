"""How a sparse layer multiplies: the first kernel in the list that accepts a weight takes it.

A new kernel is one file and one entry in KERNELS. The reference path, which unpacks the stored
form at every call, is always there and always valid.
"""

from __future__ import annotations

from .base import Choice, Kernel, Stored, Verdict
from .cpu.kernel import TileKernel
from .dense import DenseKernel
from .gpu.kernel import SlicedKernel
from .gpu.semi_structured import SemiStructuredKernel

KERNELS: tuple[type[Kernel], ...] = (
    TileKernel,
    SemiStructuredKernel,
    SlicedKernel,
    DenseKernel,
)

__all__ = ["KERNELS", "Choice", "Kernel", "Stored", "Verdict", "choose"]


def choose(stored: Stored) -> Choice:
    """Resolve the kernel for one layer, with the reasons."""
    trace: list[Verdict] = []
    for cls in KERNELS:
        considered = cls.consider(stored)
        trace.append(considered.verdict)
        if considered.kernel is not None:
            return Choice(considered.kernel, tuple(trace))
    trace.append(Verdict("reference", True, "unpacks the stored weight at every call"))
    return Choice(None, tuple(trace))
