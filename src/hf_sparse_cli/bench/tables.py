"""What was measured as files: results.json, results.md and, with matplotlib, speedup.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_sparse.kernels.cpu import library
from hf_sparse.kernels.machine import processor

from .endtoend import MemoryPoint, SpeedPoint
from .layers import LayerPoint

RESULTS = "results.json"


def machine() -> str:
    """The processor, the library versions and the kernels, in a line."""
    return f"{processor()}, torch {torch.__version__}; {library.describe()}"


def markdown(
    layers: Sequence[LayerPoint], speed: Sequence[SpeedPoint], memory: Sequence[MemoryPoint]
) -> str:
    """Tables; ratios say how many times as fast the sparse candidate is."""
    lines = [f"Measured on {machine()}.", ""]
    if layers:
        rivals = list(dict.fromkeys(name for point in layers for name in point.ratios))
        lines += [
            "| path | shape | sparsity | values | threads | M | bytes / dense bf16 | "
            + " | ".join(f"over {name}" for name in rivals)
            + " |",
            "|---" * (7 + len(rivals)) + "|",
        ]
        for p in layers:
            ratios = " | ".join(
                f"{p.ratios[name]:.2f}" if name in p.ratios else "-" for name in rivals
            )
            lines.append(
                f"| {p.path} | {p.shape[0]}x{p.shape[1]} | {p.sparsity:.0%} | {p.values} | "
                f"{p.threads} | {p.rows} | {p.sparse_bytes / p.dense_bytes:.3f} | {ratios} |"
            )
        lines.append("")
    if speed:
        lines += [
            "| model | sparsity | threads | dtype | decode, dense tokens/s | sparse | ratio | "
            "prefill ratio | weights, MB dense | sparse | kernels |",
            "|---" * 11 + "|",
        ]
        for s in speed:
            dense, sparse = (1 / s.decode_seconds[kind] for kind in ("dense", "sparse"))
            weights = (s.weight_bytes[kind] / 1e6 for kind in ("dense", "sparse"))
            kernels = ", ".join(f"{count} {name}" for name, count in s.kernels.items())
            lines.append(
                f"| {s.preset} | {s.sparsity:.0%} | {s.threads} | {s.dtype} | {dense:.1f} | "
                f"{sparse:.1f} | {s.decode_ratio:.2f} | {s.prefill_ratio:.2f} | "
                + " | ".join(f"{w:.0f}" for w in weights)
                + f" | {kernels} |"
            )
        lines.append("")
    if memory:
        lines += [
            "| model | sparsity | process, MB | started | peak while loading | loaded | used |",
            "|---" * 7 + "|",
        ]
        for m in memory:
            for kind in ("dense", "sparse"):
                figures = " | ".join(
                    f"{values[kind] / 1e6:.0f}" for values in (m.started, m.peak, m.loaded, m.used)
                )
                lines.append(f"| {m.preset} | {m.sparsity:.0%} | {kind} | {figures} |")
        lines.append("")
    return "\n".join(lines)


def write(
    folder: Path | None,
    layers: Sequence[LayerPoint],
    speed: Sequence[SpeedPoint],
    memory: Sequence[MemoryPoint],
) -> tuple[str, dict[str, Any]]:
    """Write all files into a folder, if there is one; the tables and what is in the JSON file."""
    content = {
        "machine": machine(),
        "layers": [asdict(point) for point in layers],
        "speed": [asdict(point) for point in speed],
        "memory": [asdict(point) for point in memory],
    }
    text = markdown(layers, speed, memory)
    if folder is None:
        return text, content
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text(json.dumps(content, indent=1))
    if layers:
        text += _plot(folder / "speedup.png", layers)
    (folder / "results.md").write_text(text)
    return text, content


def _plot(file: Path, layers: Sequence[LayerPoint]) -> str:
    """Speed-up over torch fp32 against M, a line per sparsity, a panel per shape."""
    try:
        import matplotlib
    except ImportError:
        return "No plot: it needs matplotlib (pip install matplotlib).\n"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(point.shape for point in layers))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.5), squeeze=False)
    first = layers[0]
    for axis, shape in zip(axes[0], shapes, strict=True):
        chosen = [
            p
            for p in layers
            if (p.shape, p.threads, p.values) == (shape, first.threads, first.values)
        ]
        for sparsity in dict.fromkeys(p.sparsity for p in chosen):
            line = sorted(
                (p.rows, p.ratios["torch fp32"]) for p in chosen if p.sparsity == sparsity
            )
            axis.plot(*zip(*line, strict=True), marker="o", label=f"{sparsity:.0%}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="tokens (M)", title=f"{shape[0]}x{shape[1]}")
        axis.legend()
    axes[0][0].set_ylabel("times as fast as torch fp32")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    return f"Plot: {file.name}\n"
