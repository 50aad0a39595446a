"""The alternatives as one table and one plot: bytes, tokens a second, perplexity."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_sparse.kernels.cpu import library

from .alternatives import Alternative
from .tables import RESULTS, machine


def markdown(rows: Sequence[Alternative]) -> str:
    """A line each; shares are those of dense bf16, by whose name that row is found."""
    dense = next(row for row in rows if row.name == "dense bf16")
    lines = [
        f"Measured on {machine()}; {library.describe_threads()}.",
        "",
        "| form | tokens/s | over dense bf16 | MB | of dense bf16 | perplexity |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        if row.problem:
            lines.append(f"| {row.name} | {row.problem} | | | | |")
            continue
        worth = "-" if row.perplexity is None else f"{row.perplexity:.2f}"
        lines.append(
            f"| {row.name} | {row.tokens_per_second:.1f} | "
            f"{row.tokens_per_second / dense.tokens_per_second:.2f} | {row.nbytes / 1e6:.1f} | "
            f"{row.nbytes / dense.nbytes:.2f} | {worth} |"
        )
    return "\n".join([*lines, ""])


def write(folder: Path | None, rows: Sequence[Alternative]) -> tuple[str, dict[str, Any]]:
    """Write all files into a folder, if one is named; the table and what is in the JSON file."""
    content = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "alternatives": [row.to_dict() for row in rows],
    }
    text = markdown(rows)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).write_text(json.dumps(content, indent=1))
        text += _plot(folder / "alternatives.png", rows)
        (folder / "results.md").write_text(text)
    return text, content


def _plot(file: Path, rows: Sequence[Alternative]) -> str:
    """Tokens a second against bytes; where perplexity is known, in colour, with its value."""
    try:
        import matplotlib
    except ImportError:
        return "No plot: it needs matplotlib (pip install matplotlib).\n"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    measured = [row for row in rows if not row.problem]
    known = [row for row in measured if row.perplexity is not None]
    others = [row for row in measured if row.perplexity is None]
    for some, colours in ((known, [row.perplexity for row in known]), (others, None)):
        if not some:
            continue
        places = [row.nbytes / 1e6 for row in some], [row.tokens_per_second for row in some]
        if colours is None:
            axis.scatter(*places, color="grey")
        else:
            figure.colorbar(axis.scatter(*places, c=colours), label="perplexity")
    for row in measured:
        worth = "" if row.perplexity is None else f" ({row.perplexity:.2f})"
        place = row.nbytes / 1e6, row.tokens_per_second
        axis.annotate(
            row.name + worth, place, xytext=(4, 4), textcoords="offset points", fontsize=8
        )
    axis.set(xlabel="MB of weights", ylabel="tokens/s")
    axis.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    return f"Plot: {file.name}\n"
