"""Calibration data in csv files."""

from __future__ import annotations

import codecs
import csv
import mmap
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from ..core.errors import CalibrationError
from .unfolding import UnfoldingLimit

SEPARATORS = ",;\t|"
MISSING = {"", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"}
BOOLEANS = {"true": True, "false": False}


class CsvRows(Sequence[Any]):
    """The rows of a csv file, each read when it is asked for.

    A column in which each cell is a number, a boolean or missing holds those, any other one text;
    what is missing is None.

    Raises:
        CalibrationError: there is no header, or a row that doesn't go with it.
        UnicodeDecodeError: it isn't UTF-8.
    """

    def __init__(self, content: mmap.mmap | bytes, limit: UnfoldingLimit) -> None:
        self._content, self._name = content, limit.name
        self._spans = array("q")
        start = len(codecs.BOM_UTF8) if content[:3] == codecs.BOM_UTF8 else 0
        first = content[start : content.find(b"\n", start) + 1 or len(content)].decode("utf-8")
        self._separator = max(SEPARATORS, key=first.count)
        with _long_cells():
            records = self._records(start)
            self._columns = _distinct(next(records, ([], 0, 0))[0])
            if not self._columns:
                raise CalibrationError(
                    f"{limit.name} can't be read as csv: its first line is no header"
                )
            self._plain = set(range(len(self._columns)))  # columns without text, so far
            for cells, begin, end in records:
                if len(cells) > len(self._columns):
                    raise CalibrationError(
                        f"{limit.name} can't be read as csv: row {len(self)} has {len(cells)} "
                        f"cells, the header {len(self._columns)}"
                    )
                self._spans.extend((begin, end))
                limit.check(8 * len(self._spans), "the places of its rows")
                texts = [i for i in self._plain if i < len(cells) and _is_text(cells[i])]
                self._plain.difference_update(texts)

    def __len__(self) -> int:
        return len(self._spans) // 2

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        begin, end = self._spans[2 * place : 2 * place + 2]
        with _long_cells():
            (cells,) = csv.reader(
                [self._content[begin:end].decode("utf-8")], delimiter=self._separator
            )
        values = [
            None if cell in MISSING else _plain(cell) if i in self._plain else cell
            for i, cell in enumerate(cells)
        ]
        return dict(zip_longest(self._columns, values))

    def _records(self, start: int) -> Iterator[tuple[list[str], int, int]]:
        """The cells of each record that has any, and from where to where it goes."""
        end = start

        def lines() -> Iterator[str]:
            nonlocal end
            while end < len(self._content):
                begin, end = end, self._content.find(b"\n", end) + 1 or len(self._content)
                yield self._content[begin:end].decode("utf-8")

        records = csv.reader(lines(), delimiter=self._separator, strict=True)
        while True:
            begin = end
            try:
                cells = next(records, None)
            except csv.Error as error:
                raise CalibrationError(
                    f"{self._name} can't be read as csv: line {records.line_num}: {error}"
                ) from None
            if cells is None:
                return
            if cells:
                yield cells, begin, end


@contextmanager
def _long_cells() -> Iterator[None]:
    """Cells as long as a file: the csv module's own limit is 131,072 letters."""
    limit = csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _distinct(names: list[str]) -> list[str]:
    """The names of columns; of equal ones the later ones have a number."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name if name not in seen else f"{name}.{names[: len(seen)].count(name)}"] = 1
    return list(seen)


def _is_text(cell: str) -> bool:
    return cell not in MISSING and isinstance(_plain(cell), str)


def _plain(cell: str) -> Any:
    """The number or boolean that a cell stands for; else the cell."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return BOOLEANS.get(cell.lower(), cell)
