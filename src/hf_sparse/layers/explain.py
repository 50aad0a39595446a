"""`explain`: which kernel each sparse layer uses on this machine, why, and what it costs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from ..kernels import Verdict
from ..kernels.cpu import library
from ..kernels.gpu import timing
from ..kernels.machine import processor
from ..kernels.token_classes import Way
from . import SparseLinear
from .head import HeadLinear


@dataclass(frozen=True)
class LayerExplanation:
    """One sparse layer.

    Attributes:
        name: the module's name.
        shape: (out, in).
        format: how it is stored, e.g. "bitmask" or "4-bit bitmask".
        kernel: what multiplies: "tile" (native), "dense" (decoded once) or "reference".
        bytes_dense: of the dense weight in the layer's dtype.
        bytes_resident: of what is in memory.
        speedup: over the dense product at one token, measured on this machine; None if not
            measured.
        ways: for each class of numbers of tokens, how products are made and what was measured;
            empty if there is no choice.
        trace: every kernel that was considered, with the reason; the last one is used.
    """

    name: str
    shape: tuple[int, int]
    format: str
    kernel: str
    bytes_dense: int
    bytes_resident: int
    speedup: float | None
    ways: tuple[Way, ...]
    trace: tuple[Verdict, ...]


@dataclass(frozen=True)
class Explanation:
    """All sparse layers of a model on this machine; `print` it.

    Attributes:
        machine: the processor, the threads, the versions and the native paths.
        layers: one each.
        head: what the dense output head gains from the native product of one token; None if it
            doesn't use it.
    """

    machine: str
    layers: tuple[LayerExplanation, ...]
    head: str | None = None

    @property
    def bytes_dense(self) -> int:
        """Bytes of all sparse layers' weights, were they dense."""
        return sum(layer.bytes_dense for layer in self.layers)

    @property
    def bytes_resident(self) -> int:
        """Bytes of all sparse layers' weights in memory."""
        return sum(layer.bytes_resident for layer in self.layers)

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers], default=5)
        lines = [
            self.machine,
            f"{'layer':<{width}}  {'shape':<13} {'format':<14} kernel     bytes  {'speed':<21} why",
        ]
        for layer in self.layers:
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            share = layer.bytes_resident / layer.bytes_dense
            why = "; ".join(f"{v.kernel}: {v.reason}" for v in layer.trace)
            lines.append(
                f"{layer.name:<{width}}  {shape:<13} {layer.format:<14} {layer.kernel:<9} "
                f"{share:6.3f}  {_speed(layer):<21} {why}"
            )
        used = Counter(layer.kernel for layer in self.layers)
        counts = ", ".join(f"{count} {kernel}" for kernel, count in used.items()) or "none"
        total = self.bytes_resident / self.bytes_dense if self.layers else 1.0
        lines.append(f"sparse layers: {counts}; {total:.3f} of the dense bytes in memory")
        if self.head is not None:
            lines.append(self.head)
        ways = ((x.kernel, ", ".join(way.tokens for way in x.ways)) for x in self.layers if x.ways)
        for kernel, tokens in dict.fromkeys(ways):
            lines.append(f"speed of {kernel}: times that of the dense product, for {tokens} tokens")
        return "\n".join(lines)


def _speed(layer: LayerExplanation) -> str:
    """Speed-ups by class of tokens, or the one there is."""
    found = [way.speedup for way in layer.ways] or [layer.speedup]
    return " ".join("-" if speedup is None else f"{speedup:.2f}" for speedup in found)


def explain(model: nn.Module) -> Explanation:
    """Say, for every sparse layer of a model, which kernel it uses here and why.

    Bytes are shares of the dense weight's, speed is over the dense product, for each class of
    numbers of tokens.

    Args:
        model: any model with `SparseLinear` layers; without any the table is empty.
    """
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if torch.cuda.is_available():
        machine = f"{timing.gpu()}; {machine}"
    layers = [
        LayerExplanation(
            name=name,
            shape=layer.shape,
            format=layer.format.label,
            kernel=layer.trace[-1].kernel,
            bytes_dense=math.prod(layer.shape) * layer.weight_dtype.itemsize,
            bytes_resident=layer.resident_bytes(),
            speedup=layer.trace[-1].speedup,
            ways=layer.trace[-1].ways,
            trace=layer.trace,
        )
        for name, layer in model.named_modules()
        if isinstance(layer, SparseLinear)
    ]
    heads = (
        f"dense head {name}: native at one token, {module.speedup:.2f}"
        for name, module in model.named_modules()
        if isinstance(module, HeadLinear)
    )
    return Explanation(f"{machine}; {library.describe()}", tuple(layers), next(heads, None))
