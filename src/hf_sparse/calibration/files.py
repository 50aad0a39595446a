"""Calibration data in files: text, JSON, csv and parquet.

Nothing is read whole that needn't be: the values of JSON lines are parsed when they are asked for,
tables and compressed JSON are what `datasets` makes of them, memory-mapped.
"""

from __future__ import annotations

import codecs
import json
import lzma
import re
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from ..core.errors import CalibrationError

JSON_TYPES = (".jsonl", ".ndjson", ".json")
TABLE_TYPES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
FILE_TYPES = (".txt", ".text", ".md", *JSON_TYPES, *TABLE_TYPES)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def file_type(path: Path) -> str:
    """The end of a file's name that tells what it is, in lower case, before that of compression."""
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return plain.suffix.lower()


def read_file(path: Path) -> Sequence[Any]:
    """What a file consists of; of any other type than `FILE_TYPES`, it is read as text.

    - text: documents, separated by lines that hold only a NUL byte;
    - JSON: the value of each line, or the values of one array, which may be the only one of an
      object;
    - csv (separated by commas, semicolons, tabs or bars) and parquet: rows.

    Any of them may be compressed, as its name's end says (`COMPRESSED`).

    Raises:
        CalibrationError: it isn't what its name says, or can't be read; names the file.
    """
    try:
        kind, compressed = file_type(path), path.suffix.lower() in COMPRESSED
        if kind in TABLE_TYPES:
            return _read_table(path, TABLE_TYPES[kind])
        if kind in JSON_TYPES:
            return _read_table(path, "json") if compressed else _read_json(path)
        with _opened(path) as file:
            text = file.read()
        return [page for page in re.split(r"\n?\n\0\n", text) if page.strip()]
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"dataset {path.name} is not UTF-8 text: {error}. Files may be text, JSON, csv or "
            f"parquet, and are told apart by their names: {', '.join(FILE_TYPES)}"
        ) from None
    except CalibrationError:
        raise
    except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise CalibrationError(f"dataset {str(path)!r} can't be read: {error}") from None


class JsonLines(Sequence[Any]):
    """The JSON values of a file, one a line, each parsed when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = array("q")
        with path.open("rb") as file:
            start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
            file.seek(start)
            for line in file:
                if not line.isspace():
                    self._starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
            try:
                return _parsed(line)
            except ValueError as error:
                file.seek(0)
                number = 1 + file.read(self._starts[index]).count(b"\n")
                raise CalibrationError(
                    f"{self._path.name} is not JSON lines: line {number}: {error}"
                ) from None


def _read_json(path: Path) -> Sequence[Any]:
    lines = JsonLines(path)
    if len(lines) == 0 or (len(lines) > 1 and _is_value(lines)):
        return lines
    try:
        whole = _parsed(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise CalibrationError(
            f"{path.name} is not JSON lines, nor one JSON array: {error}"
        ) from None
    if isinstance(whole, dict):
        arrays = [value for value in whole.values() if isinstance(value, list)]
        rows = len(arrays) == 1 and all(isinstance(row, dict | str) for row in arrays[0])
        whole = arrays[0] if rows and "text" not in whole else whole
    one_sample = bool(whole) and all(isinstance(value, int) for value in whole)
    return whole if isinstance(whole, list) and not one_sample else [whole]


def _is_value(lines: JsonLines) -> bool:
    """Is the first line a value of its own, not the beginning of one?"""
    try:
        lines[0]
    except CalibrationError:
        return False
    return True


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _opened(path: Path) -> Any:
    """A file as text, without a byte order mark."""
    compression = "infer" if path.suffix.lower() in COMPRESSED else None
    return LocalFileSystem().open(
        str(path.absolute()), "rt", compression=compression, encoding="utf-8-sig"
    )


def _read_table(path: Path, kind: str) -> Sequence[Any]:
    """A csv, parquet or compressed JSON file, by `datasets`."""
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"reading {path.name} needs the package datasets: pip install datasets"
        ) from None
    settings: dict[str, Any] = {}
    if kind == "parquet":
        settings["batch_size"] = 1000  # else a whole row group at once
    elif kind == "csv":
        with _opened(path) as file:
            settings["sep"] = max(",;\t|", key=file.readline().count)
    try:
        table: Sequence[Any] = datasets.load_dataset(
            kind, data_files=str(path), split="train", **settings
        )
    except Exception as error:  # of whichever library reads it
        raise CalibrationError(
            f"{path.name} can't be read as {kind}: {root_cause(error)}"
        ) from error
    return table


def root_cause(error: BaseException) -> str:
    """In one line, the error that others were raised from."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(f"{type(error).__name__}: {error}".split())
