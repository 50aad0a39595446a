"""Packed or dense: decided for a model as a whole, from what its layers cost on this machine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from ..core.logging import get_logger
from ..kernels import Form, Verdict
from ..kernels.dense import DenseKernel
from .linear import SparseLinear, sparse_layers

logger = get_logger(__name__)

# Packed layers may take this much longer for a token, times the share of memory that they save:
# half the bytes are worth an eighth of the speed. Within, a measurement's noise decides nothing.
WORTH = 0.25


@dataclass(frozen=True)
class Cost:
    """What some sparse layers cost here, packed and dense.

    Attributes:
        seconds, dense_seconds: of their products for one token; estimated.
        nbytes, dense_nbytes: of their weights in memory.
    """

    seconds: float
    dense_seconds: float
    nbytes: int
    dense_nbytes: int

    @property
    def pays(self) -> bool:
        """Are they better packed, speed and memory taken together?"""
        saved = 1 - self.nbytes / self.dense_nbytes
        return self.seconds <= self.dense_seconds * (1 + WORTH * max(0.0, saved))

    @classmethod
    def of(cls, layers: Iterable[SparseLinear]) -> Cost | None:
        """That of packed layers; None if nothing was measured."""
        found = [
            (seconds, seconds * speedup, layer.resident_bytes(), dense_bytes(layer))
            for layer in layers
            for seconds, speedup in [(layer.trace[-1].seconds, layer.trace[-1].speedup)]
            if seconds is not None and speedup is not None
        ]
        if not found:
            return None
        seconds, dense_seconds, nbytes, dense_nbytes = zip(*found, strict=True)
        return cls(sum(seconds), sum(dense_seconds), sum(nbytes), sum(dense_nbytes))


def dense_bytes(layer: SparseLinear) -> int:
    """Bytes of a layer's weight, were it dense."""
    return math.prod(layer.shape) * layer.weight_dtype.itemsize


def prefer(model: nn.Module, what: str) -> None:
    """Hold a model's sparse layers in the form that suits what is preferred.

    Args:
        model: any module tree. Layers without a kernel, as in training or offloaded, stay as they
            are; so do those with a kernel for which nothing was measured.
        what: "memory", packed wherever a kernel can multiply them; "speed", each in the form that
            is faster for one token; "auto", all packed or all dense, by `Cost.pays`.
    """
    layers = [layer for layer in sparse_layers(model).values() if layer.kernel is not None]
    for layer in layers:
        _want(layer, "packed" if what == "memory" else "any")
    if what == "memory":
        return
    measured = [layer for layer in layers if layer.trace[-1].seconds is not None]
    cost = Cost.of(measured)
    if cost is None or (what == "auto" and cost.pays):
        return
    for layer in measured:
        verdict = layer.trace[-1]
        if what == "auto" or (verdict.speedup is not None and verdict.speedup < 1):
            _want(layer, "dense")
            layer.trace = tuple(_turned_down(v, verdict, what, cost) for v in layer.trace)
    logger.info("sparse layers that are faster dense are decoded: prefer=%r", what)


def _want(layer: SparseLinear, form: Form) -> None:
    """Have a kernel hold the layer's weight in a form, now if one does and whenever one will."""
    layer.form, kernel = form, layer.kernel
    if kernel is not None and isinstance(kernel, DenseKernel) != (form == "dense"):
        layer.hold(layer.stored)
        layer.resolve()


def _turned_down(now: Verdict, before: Verdict, what: str, cost: Cost) -> Verdict:
    """What became of the kernel that a layer had: it keeps what was measured."""
    if now.kernel != before.kernel:
        return now
    reason = f"{before.speedup:.2f} of the dense product's speed at one token"
    if what == "auto":
        reason = (
            f"{cost.dense_seconds / cost.seconds:.2f} of the dense products' speed at one token, "
            f"over all sparse layers, for {cost.nbytes / cost.dense_nbytes:.2f} of their bytes"
        )
    return replace(before, accepted=False, reason=f"prefer={what!r}: {reason}")
