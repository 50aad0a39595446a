"""Calibration data in parquet files, of which no more is in memory than a few rows.

A parquet file of a few KB may hold gigabytes: pages are compressed, and a value that is repeated
stands in a dictionary once. So texts stay in their dictionary until a row is made of them, rows are
decoded some at a time, and what can't be taken apart (a column's page, a row, a list) is held
against a limit before it is made.
"""

from __future__ import annotations

import mmap
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any

from ..core.errors import CalibrationError
from .unfolding import UnfoldingLimit

BATCH = 64  # rows that are decoded at once
FEWEST, MOST = 8, 4096  # rows that are looked for in one pass
_VALUE = 32  # bytes of a Python object, at least


class ParquetRows(Sequence[Any]):
    """The rows of a parquet file as `datasets` decodes them.

    Raises:
        CalibrationError: it is none, or a part of it takes more room than it may.
    """

    def __init__(self, content: mmap.mmap | bytes, limit: UnfoldingLimit) -> None:
        from datasets import Features
        from pyarrow import BufferReader, py_buffer
        from pyarrow.parquet import ParquetFile, read_metadata

        self._limit = limit
        file = BufferReader(py_buffer(content))
        described = read_metadata(file)
        leaves = [described.schema.column(i) for i in range(described.num_columns)]
        groups = [described.row_group(i) for i in range(described.num_row_groups)]
        limit.check(8 * described.num_rows, "the order of its rows")
        for group in groups:
            for number, leaf in enumerate(leaves):
                column, width = group.column(number), max(leaf.length or 0, 8)
                limit.check(column.total_uncompressed_size, f"column {leaf.path!r}")
                values = column.num_values if leaf.max_repetition_level else BATCH
                limit.check(width * values, f"the values of column {leaf.path!r}")
        texts = [
            leaf.path
            for leaf in leaves
            if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL"
        ]
        self._features = Features.from_arrow_schema(described.schema.to_arrow_schema())
        self._file = ParquetFile(file, metadata=described, read_dictionary=texts, pre_buffer=False)
        self._ends = list(accumulate(group.num_rows for group in groups))
        self._group, self._batches = -1, iter(())
        self._begin, self._batch = 0, None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        ((_, row),) = self.each([range(len(self))[index]])
        return row

    def each(self, places: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows by their places, in the order that these have.

        Some are looked for in one pass, twice as many each time, as long as they have room.
        """
        places, size = iter(places), FEWEST
        while wanted := list(islice(places, size)):
            while wanted:
                found = self._found(wanted[:size])
                if found is None:
                    size = -(-size // 2)
                else:
                    yield from zip(wanted, found, strict=False)
                    wanted = wanted[len(found) :]
            size = min(2 * size, MOST)

    def _found(self, places: list[int]) -> list[dict[str, Any]] | None:
        """The rows at some places; None if these are several that have no room together."""
        found: dict[int, dict[str, Any]] = {}
        taken = 0
        for place in sorted(places):
            try:
                row = self._at(place)
                size = sum(map(_size, row.columns))
                taken += size
                if taken > self._limit.size and len(places) > 1:
                    return None
                self._limit.check(size, f"row {place}")
                found[place] = self._decoded(row, place)
            except CalibrationError:
                raise
            except Exception as error:  # of damaged pages: of whichever library reads them
                raise CalibrationError(
                    f"{self._limit.name} can't be read as parquet: row {place}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return [found[place] for place in places]

    def _decoded(self, row: Any, place: int) -> dict[str, Any]:
        (raw,) = row.to_pylist()
        if named := _named_file(raw):
            raise CalibrationError(
                f"{self._limit.name}: row {place} names a file, {named!r}, where it should hold "
                "what is in it: save the data set with its files embedded"
            )
        decoded: dict[str, Any] = self._features.decode_example(raw)
        return decoded

    def _at(self, place: int) -> Any:
        """The record batch of the one row at a place."""
        group = bisect(self._ends, place)
        if group != self._group or place < self._begin:
            self._group, self._batch = group, None
            self._begin = self._ends[group - 1] if group else 0
            self._batches = self._file.iter_batches(BATCH, row_groups=[group], use_threads=False)
        while self._batch is None or place >= self._begin + len(self._batch):
            self._begin += len(self._batch) if self._batch is not None else 0
            self._batch = next(self._batches)
        return self._batch.slice(place - self._begin, 1)


def _named_file(value: Any) -> str | None:
    """The path or URL of an image or sound that isn't in a row itself, and would be opened."""
    if isinstance(value, dict):
        if set(value) == {"bytes", "path"} and value["bytes"] is None:
            return value["path"]  # type: ignore[no-any-return]
        value = list(value.values())
    return next(filter(None, map(_named_file, value)), None) if isinstance(value, list) else None


def _size(values: Any) -> int:
    """Bytes that Python's objects for a column's values take, without what is in common."""
    from pyarrow import compute, types

    kind = values.type
    if types.is_dictionary(kind):
        lengths = compute.binary_length(values.dictionary).take(values.indices)
        return _VALUE * len(values) + int(compute.sum(lengths).as_py() or 0)
    if types.is_struct(kind) or types.is_map(kind):
        parts = values.flatten()
        return _VALUE * len(values) + sum(map(_size, parts if isinstance(parts, list) else [parts]))
    if types.is_nested(kind):
        return _VALUE * len(values) + _size(values.flatten())
    return _VALUE * len(values) + int(values.nbytes)
