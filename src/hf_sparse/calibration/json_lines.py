"""Calibration data in JSON: a value a line, or one array."""

from __future__ import annotations

import codecs
import json
import mmap
from array import array
from collections.abc import Sequence
from typing import Any

from ..core.errors import CalibrationError
from .unfolding import UnfoldingLimit

# Bytes of Python's objects: an empty list or dict, and a number in a list.
_CONTAINER, _VALUE = 80, 40


class JsonLines(Sequence[Any]):
    """The JSON values of a file, one a line, each parsed when it is asked for."""

    def __init__(self, content: mmap.mmap | bytes, limit: UnfoldingLimit) -> None:
        self._content, self._limit = content, limit
        self._starts = array("q")
        start = len(codecs.BOM_UTF8) if content[:3] == codecs.BOM_UTF8 else 0
        while start < len(content):
            end = self._end(start)
            if not content[start:end].isspace():
                self._starts.append(start)
                limit.check(16 * len(self._starts), "the places of its lines")
            start = end

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        start = self._starts[index]
        try:
            return _parsed(self._content[start : self._end(start)], self._limit)
        except ValueError as error:
            number = 1 + self._content[:start].count(b"\n")
            raise CalibrationError(
                f"{self._limit.name} is not JSON lines: line {number}: {error}"
            ) from None

    def _end(self, start: int) -> int:
        return self._content.find(b"\n", start) + 1 or len(self._content)

    def whole(self) -> Any:
        """All of the file as one JSON value."""
        try:
            return _parsed(self._content[:].removeprefix(codecs.BOM_UTF8), self._limit)
        except ValueError as error:
            raise CalibrationError(
                f"{self._limit.name} is not JSON lines, nor one JSON array: {error}"
            ) from None


def read_json(content: mmap.mmap | bytes, limit: UnfoldingLimit) -> Sequence[Any]:
    """The value of each line, or the values of one array, which may be the only one of an object.

    Raises:
        CalibrationError: it is no JSON, or takes more room than it may.
    """
    lines = JsonLines(content, limit)
    if len(lines) == 0 or (len(lines) > 1 and _is_value(lines)):
        return lines
    whole = lines.whole()
    if isinstance(whole, dict):
        arrays = [value for value in whole.values() if isinstance(value, list)]
        rows = len(arrays) == 1 and all(isinstance(row, dict | str) for row in arrays[0])
        whole = arrays[0] if rows and "text" not in whole else whole
    if not isinstance(whole, list):
        return [whole]
    one_sample = bool(whole) and all(isinstance(value, int) for value in whole)
    return [whole] if one_sample else whole


def _is_value(lines: JsonLines) -> bool:
    """Is the first line a value of its own, not the beginning of one?"""
    try:
        lines[0]
    except CalibrationError:
        return False
    return True


def _parsed(text: bytes, limit: UnfoldingLimit) -> Any:
    containers, values = text.count(b"[") + text.count(b"{"), text.count(b",")
    limit.check(_CONTAINER * containers + _VALUE * values, "a JSON value in memory")
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
