"""A comparison as a picture, with matplotlib."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import EvaluationError

if TYPE_CHECKING:
    from .result import Comparison, Point


def require_matplotlib() -> None:
    """Raise an EvaluationError unless matplotlib is installed."""
    if find_spec("matplotlib") is None:
        raise EvaluationError("a plot needs matplotlib: pip install 'hf_sparse[bench]'")


def draw(comparison: Comparison) -> Any:
    """Three panels over sparsity: score, seconds, bytes as a share of the dense weights'.

    Unstructured points of a method are joined; n:m points stand alone, with their pattern.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    score, seconds, size = figure.subplots(1, 3)
    methods = dict.fromkeys(point.method for point in comparison.points)
    for index, method in enumerate(methods):
        points = [p for p in comparison.points if p.method == method and p.error is None]
        points = [p for p in points if math.isfinite(p.score or 0.0)]
        colour = f"C{index % 10}"
        _draw(score, points, [p.score for p in points], colour, method)
        _draw(seconds, points, [p.seconds for p in points], colour, method)
        stored = [p.share(p.bytes_stored) for p in points]
        _draw(size, points, stored, colour, f"{method}, stored")
        resident = [p.share(p.bytes_resident) for p in points]
        _draw(size, points, resident, colour, f"{method}, in memory", hollow=True)
    if math.isfinite(comparison.dense):
        score.axhline(comparison.dense, color="grey", linewidth=0.8, label="dense")
    size.axhline(1, color="grey", linewidth=0.8)
    for axis, title in (
        (score, comparison.measure),
        (seconds, "seconds of pruning"),
        (size, "bytes over dense"),
    ):
        axis.set(xlabel="sparsity", ylabel=title)
        axis.legend(fontsize="small")
    return figure


def _draw(
    axis: Any,
    points: list[Point],
    values: list[float | None],
    colour: str,
    label: str,
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
        label=label,
        **style,
    )
    for p, v in pairs:
        if isinstance(p.setting, str):
            axis.plot([p.sparsity], [v], marker="s", linestyle="", **style)
            axis.annotate(p.setting, (p.sparsity, v), xytext=(4, 4), textcoords="offset points")
