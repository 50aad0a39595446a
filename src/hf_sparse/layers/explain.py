"""`explain`: what a model's sparse layers cost and gain on this machine, and why."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..kernels import Verdict
from ..kernels.cpu import library, speed
from ..kernels.dense import DenseKernel
from ..kernels.gpu import timing
from ..kernels.machine import processor
from ..kernels.token_classes import Way
from .attention.speed import describe
from .head import HeadLinear
from .head_preview import PreviewedHead
from .linear import SparseLinear, sparse_layers
from .prefer import dense_bytes


@dataclass(frozen=True)
class LayerExplanation:
    """One sparse layer.

    Attributes:
        name: the module's name.
        shape: (out, in).
        format: how it is stored, e.g. "bitmask" or "4-bit bitmask".
        kernel: what multiplies: "tile", "columns" or "integer" (native), "dense" (decoded once) or
            "reference".
        bytes_dense: of the dense weight in the layer's dtype.
        bytes_resident: of what is in memory.
        speedup: over the dense product at one token, measured on this machine; None if not
            measured.
        ways: for each class of numbers of tokens, how products are made and what was measured;
            empty if there is no choice.
        trace: every kernel that was considered, with the reason; the last one is used.
        skipped_inputs: share of the inputs that count as 0, of the calibration data's.
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
    skipped_inputs: float = 0.0

    @property
    def why(self) -> str:
        """The reasons, in a line."""
        return "; ".join(f"{verdict.kernel}: {verdict.reason}" for verdict in self.trace)


@dataclass(frozen=True)
class Explanation:
    """All sparse layers of a model on this machine; `print` it.

    Attributes:
        machine: the processor, the threads, the versions and the native paths.
        layers: one each.
        head: what the dense output head gains from the native product of one token, or how many
            candidates a preview leaves it; None if it has neither.
        attention: from which length on the model's sparse attention pays here; None if it has none.
        speedup: of all sparse layers' products of one token together, as they are held; over dense
            ones of each dtype, by its name; without those that were not measured.
    """

    machine: str
    layers: tuple[LayerExplanation, ...]
    head: str | None = None
    attention: str | None = None
    speedup: Mapping[str, float] = field(default_factory=dict)

    @property
    def bytes_dense(self) -> int:
        """Bytes of all sparse layers' weights, were they dense."""
        return sum(layer.bytes_dense for layer in self.layers)

    @property
    def bytes_resident(self) -> int:
        """Bytes of all sparse layers' weights in memory."""
        return sum(layer.bytes_resident for layer in self.layers)

    @property
    def verdict(self) -> str:
        """What the sparse layers cost and gain here, in a few lines."""
        if not self.layers:
            return "\n".join(["no sparse layers", *_given(self.attention)])
        weights = sum(math.prod(layer.shape) for layer in self.layers)
        used = Counter(layer.kernel for layer in self.layers)
        counts = ", ".join(f"{count} {kernel}" for kernel, count in used.items())
        lines = [f"{len(self.layers)} sparse layers ({counts}), {self.bytes_resident / 1e6:.1f} MB"]
        for dtype in COMPARED:
            name = str(dtype).removeprefix("torch.")
            share = self.bytes_resident / (weights * dtype.itemsize)
            speed = self.speedup.get(name)
            gain = "not measured" if speed is None else f"{speed:.2f} times as fast"
            lines.append(f"over dense {name}: {share:.3f} of the bytes; a token's products {gain}")
        shares = [layer.skipped_inputs for layer in self.layers if layer.skipped_inputs]
        if shares:
            lines.append(f"{len(shares)} count {max(shares):.0%} of their inputs as 0")
        if used["dense"]:
            lines.append(
                f"{used['dense']} are dense in memory (the saving is on disk only): "
                'hf_sparse.prefer(model, "memory") packs those that a kernel can multiply'
            )
        return "\n".join([*lines, *_given(self.head, self.attention)])

    def __str__(self) -> str:
        """The verdict, and a line for each group of layers that are alike."""
        groups: dict[tuple[Any, ...], list[LayerExplanation]] = {}
        for layer in self.layers:
            name = re.sub(r"\d+", "*", layer.name)
            groups.setdefault((name, layer.shape, layer.format, layer.kernel), []).append(layer)
        rows = [(f"{len(alike)} x {name}", alike[0]) for (name, *_), alike in groups.items()]
        return "\n".join([self.machine, self.verdict, *_table(rows)])

    def verbose(self) -> str:
        """The verdict, and each layer with the reason for its kernel."""
        lines = _table([(layer.name, layer) for layer in self.layers])
        whys = ["", *(layer.why for layer in self.layers)]
        table = [f"{line}  {why}".rstrip() for line, why in zip(lines, whys, strict=False)]
        return "\n".join([self.machine, self.verdict, *table])


def _given(*lines: str | None) -> list[str]:
    return [line for line in lines if line is not None]


COMPARED = (torch.float32, torch.bfloat16)


def _table(rows: Sequence[tuple[str, LayerExplanation]]) -> list[str]:
    """A heading and a line each; speed is over the dense product, by number of tokens."""
    if not rows:
        return []
    width = max(len(name) for name, _ in rows)
    tokens = next((layer.ways for _, layer in rows if layer.ways), ())
    heading = "speed over dense"
    if tokens:
        heading += f", tokens {' / '.join(way.tokens for way in tokens)}"
    lines = [f"{'layers':<{width}}  {'shape':<13} {'format':<14} kernel     bytes  {heading}"]
    for name, layer in rows:
        shape = f"{layer.shape[0]}x{layer.shape[1]}"
        share = layer.bytes_resident / layer.bytes_dense
        found = [way.speedup for way in layer.ways] or [layer.speedup]
        speeds = " / ".join("-" if speedup is None else f"{speedup:.2f}" for speedup in found)
        held = f"{layer.format:<14} {layer.kernel:<9} {share:6.3f}"
        lines.append(f"{name:<{width}}  {shape:<13} {held}  {speeds}")
    return lines


def explain(model: nn.Module) -> Explanation:
    """Say what a model's sparse layers cost and gain on this machine, and which kernels they use.

    Bytes are shares of the dense weight's, speed is over the dense product, for each class of
    numbers of tokens.

    Args:
        model: any model with `SparseLinear` layers; without any the table is empty.
    """
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if torch.cuda.is_available():
        machine = f"{timing.gpu()}; {machine}"
    modules = sparse_layers(model)
    layers = [
        LayerExplanation(
            name=name,
            shape=layer.shape,
            format=layer.format.label,
            kernel=layer.trace[-1].kernel,
            bytes_dense=dense_bytes(layer),
            bytes_resident=layer.resident_bytes(),
            speedup=layer.trace[-1].speedup,
            ways=layer.trace[-1].ways,
            trace=layer.trace,
            skipped_inputs=0.0 if layer.threshold is None else layer.threshold.share,
        )
        for name, layer in modules.items()
    ]
    heads = (
        f"dense head {name}: native at one token, {module.speedup:.2f}"
        if isinstance(module, HeadLinear)
        else f"dense head {name}: {module.preview.candidates} candidates of a preview are exact"
        for name, module in model.named_modules()
        if isinstance(module, (HeadLinear, PreviewedHead))
    )
    return Explanation(
        f"{machine}; {library.describe()}; {library.describe_threads()}",
        tuple(layers),
        next(heads, None),
        describe(model),
        {
            str(dtype).removeprefix("torch."): speedup
            for dtype in COMPARED
            if (speedup := _over_dense(modules.values(), dtype)) is not None
        },
    )


def _over_dense(layers: Collection[SparseLinear], dtype: torch.dtype) -> float | None:
    """Speed of one token's products over dense ones in a dtype; None if one was not measured."""
    taken = dense = 0.0
    for layer in layers:
        own, other = _seconds(layer), _dense_seconds(layer, dtype)
        if own is None or other is None:
            return None
        taken, dense = taken + own, dense + other
    return dense / taken if layers else None


def _seconds(layer: SparseLinear) -> float | None:
    """Of a layer's product of one token, as it is held."""
    if isinstance(layer.kernel, DenseKernel):
        return _dense_seconds(layer, layer.weight_dtype)
    return layer.trace[-1].seconds


def _dense_seconds(layer: SparseLinear, dtype: torch.dtype) -> float | None:
    if layer.kernel is None or any(t.device.type != "cpu" for t in layer.kernel.tensors().values()):
        return None
    return speed.dense_token(layer.shape, dtype)
