"""A comparison as a picture, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ...core.errors import EvaluationError
from .point import ComparisonPoint


def require_matplotlib() -> None:
    """Raise an EvaluationError unless matplotlib is installed."""
    if find_spec("matplotlib") is None:
        raise EvaluationError("a plot needs matplotlib: pip install matplotlib")


def draw(points: Sequence[ComparisonPoint], measure: str, dense: float) -> Any:
    """Three panels over sparsity: score, seconds, bytes as a share of the dense weights'.

    Unstructured points of a method are joined; n:m points stand alone, with their pattern.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    score, seconds, size = figure.subplots(1, 3)
    usable = [p for p in points if p.score is not None and math.isfinite(p.score)]
    for index, method in enumerate(dict.fromkeys(p.method for p in points)):
        own = [p for p in usable if p.method == method]
        colour = f"C{index % 10}"
        _draw(score, own, [p.score for p in own], colour, method)
        _draw(seconds, own, [p.seconds for p in own], colour, method)
        stored = [p.share(p.bytes_stored) for p in own]
        _draw(size, own, stored, colour, method)
        resident = [p.share(p.bytes_resident) for p in own]
        _draw(size, own, resident, colour, None, hollow=True)
    if math.isfinite(dense):
        score.axhline(dense, color="grey", linewidth=0.8, label="dense")
    size.axhline(1, color="grey", linewidth=0.8)
    for axis, title in (
        (score, measure),
        (seconds, "seconds of pruning"),
        (size, "bytes over dense (dashed: in memory)"),
    ):
        axis.set(xlabel="sparsity", ylabel=title)
        axis.legend(fontsize="small")
    return figure


def _draw(
    axis: Any,
    points: Sequence[ComparisonPoint],
    values: Sequence[float | None],
    colour: str,
    label: str | None,
    hollow: bool = False,
) -> None:
    """One method's points: a line, and markers with a name for n:m."""
    pairs = [(p, v) for p, v in zip(points, values, strict=True) if v is not None]
    line = sorted((p.sparsity or 0.0, v) for p, v in pairs if not isinstance(p.setting, str))
    style = {"color": colour, "markerfacecolor": "none" if hollow else colour}
    axis.plot(
        [x for x, _ in line],
        [y for _, y in line],
        marker="o",
        linestyle="--" if hollow else "-",
        label=label and label.replace("$", r"\$"),  # between two of them matplotlib reads maths
        **style,
    )
    for p, v in pairs:
        if isinstance(p.setting, str):
            axis.plot([p.sparsity], [v], marker="s", linestyle="", **style)
            axis.annotate(p.setting, (p.sparsity, v), xytext=(4, 4), textcoords="offset points")
