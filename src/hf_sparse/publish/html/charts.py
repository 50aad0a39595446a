"""A line over the depth of a model, as the numbers that an SVG needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 36


@dataclass(frozen=True)
class Point:
    """A value of a chart, where it is drawn, and what it is called."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A line chart.

    Attributes:
        id, caption: as of a table.
        points: in a row.
        ticks: (y, text) of the vertical axis, from 0 up.
        marks: (x, text) of the horizontal axis.
        across: what the horizontal axis is.
        line: the points' coordinates, as SVG wants them.
    """

    id: str
    caption: str
    points: Sequence[Point]
    ticks: Sequence[tuple[float, str]]
    marks: Sequence[tuple[float, str]]
    across: str

    width, height, left, right, base = WIDTH, HEIGHT, LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM

    @property
    def line(self) -> str:
        return " ".join(f"{p.x},{p.y}" for p in self.points)


def line_chart(
    id: str, caption: str, across: str, values: Sequence[float], labels: Sequence[str]
) -> Chart:
    """A chart of values at even distances, with an axis that begins at 0.

    Args:
        id, caption, across: as in `Chart`.
        values: at least one, none below 0.
        labels: what each value belongs to.
    """
    step = _step(max(values))
    top = step * max(1, math.ceil(max(values) / step - 1e-9))

    def across_at(i: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * i / max(1, len(values) - 1), 1)

    def up_at(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top, 1)

    pairs = enumerate(zip(values, labels, strict=True))
    points = [Point(across_at(i), up_at(v), f"{name}: {v:.4g}") for i, (v, name) in pairs]
    digits = max(0, -math.floor(math.log10(step)))
    ticks = [(up_at(i * step), f"{i * step:.{digits}f}") for i in range(round(top / step) + 1)]
    every = math.ceil(len(values) / 16)
    marks = [(across_at(i), str(i)) for i in range(0, len(values), every)]
    return Chart(id, caption, points, ticks, marks, across)


def _step(highest: float) -> float:
    """1, 2 or 5 times a power of ten, so that three to seven of it reach a value."""
    if highest < 1e-300:  # nothing to see, and the power of ten below it may be no float
        return 1.0
    most = highest / 3 * (1 + 1e-9)  # 0.3 / 3 is a little less than 0.1
    power = 10.0 ** math.floor(math.log10(most))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= most)
