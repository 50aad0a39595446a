"""What a page shows as a table: plain values that the template turns into cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

STEPS = 10  # shades of a heat map
CELLS = 100_000  # of a heat map at most


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and what it is sorted by."""

    text: str
    order: float | str

    @property
    def is_number(self) -> bool:
        return not isinstance(self.order, str)


def text(value: object) -> Cell:
    """A cell of words."""
    return Cell(str(value), str(value))


def number(value: float | None, spec: str = ",", unit: float = 1.0) -> Cell:
    """A cell of a number, as a multiple of a unit; a dash, sorted first, for None."""
    if value is None:
        return Cell("-", -1.0)
    return Cell(format(value / unit if unit != 1 else value, spec), value)


@dataclass(frozen=True)
class Table:
    """A table whose columns can be sorted by.

    Attributes:
        id: its id in the page.
        caption: what it is.
        headings: of its columns.
        rows: cells, as many as headings.
        left_out: rows that are not there.
    """

    id: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left_out: int = 0


def without_empty_columns(table: Table) -> Table:
    """A table without the columns, but for the first, in which no row has anything to say."""
    kept = [
        i
        for i in range(len(table.headings))
        if i == 0 or any(row[i].text not in ("", "-") for row in table.rows)
    ]
    headings = [table.headings[i] for i in kept]
    rows = [[row[i] for i in kept] for row in table.rows]
    return replace(table, headings=headings, rows=rows)


@dataclass(frozen=True)
class Shade:
    """A cell of a heat map: its text and its shade, from 0 to 9; None if there is no value."""

    text: str
    step: int | None


@dataclass(frozen=True)
class HeatMap:
    """Values over two kinds of places.

    Attributes:
        id: its id in the page.
        caption: what the values are.
        columns: headings.
        rows: label and cells.
        low, high: what the lightest and the darkest shade stand for.
        left_out: rows that are not there.
    """

    id: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Shade]]]
    low: str
    high: str
    left_out: int = 0


Values = Mapping[tuple[str, str], Sequence[float]]


def heat_map(id: str, caption: str, values: Values, show: Callable[[float], str]) -> HeatMap | None:
    """The means of values by (row, column), in the order in which rows and columns come first.

    Returns:
        None if there are no values.
    """
    if not values:
        return None
    means = {place: fmean(found) for place, found in values.items()}
    rows = list(dict.fromkeys(row for row, _ in means))
    columns = list(dict.fromkeys(column for _, column in means))[:CELLS]
    kept = rows[: CELLS // len(columns)]
    low, high = min(means.values()), max(means.values())

    def shade(place: tuple[str, str]) -> Shade:
        if place not in means:
            return Shade("", None)
        # Where rounding is all that differs, shades would make it look like much.
        share = (means[place] - low) / (high - low) if show(low) != show(high) else 0.3
        return Shade(show(means[place]), min(int(share * STEPS), STEPS - 1))

    short = [column.rpartition(".")[2] for column in columns]
    headings = columns if len(set(short)) < len(short) else short
    cells = [(row, [shade((row, column)) for column in columns]) for row in kept]
    left_out = len(rows) - len(kept)
    return HeatMap(id, caption, headings, cells, show(low), show(high), left_out)
