"""Calibration data in files: text, JSON, csv and parquet.

Nothing but text is read whole: lines and rows are decoded when they are asked for, from the file
itself. What a small file may unfold to is limited (`unfolding`).
"""

from __future__ import annotations

import io
import lzma
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import CalibrationError
from .csv_rows import CsvRows
from .json_lines import read_json
from .parquet_rows import ParquetRows
from .unfolding import UnfoldingLimit, mapped

JSON_TYPES = (".jsonl", ".ndjson", ".json")
CSV_TYPES = (".csv", ".tsv")
FILE_TYPES = (".txt", ".text", ".md", *JSON_TYPES, *CSV_TYPES, ".parquet")
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
        CalibrationError: it isn't what its name says, can't be read, or unfolds to more than it
            may; names the file.
    """
    kind, compressed = file_type(path), path.suffix.lower() in COMPRESSED
    try:
        limit = UnfoldingLimit.of(path)
        if kind not in (*JSON_TYPES, *CSV_TYPES, ".parquet"):
            content = mapped(path, True, limit)[:] if compressed else path.read_bytes()
            text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
            return [page for page in re.split(r"\n?\n\0\n", text) if page.strip()]
        mapping = mapped(path, compressed, limit)
        if kind in JSON_TYPES:
            return read_json(mapping, limit)
        return CsvRows(mapping, limit) if kind in CSV_TYPES else _parquet(mapping, limit)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"dataset {path.name} is not UTF-8 text: {error}. Files may be text, JSON, csv or "
            f"parquet, and are told apart by their names: {', '.join(FILE_TYPES)}"
        ) from None
    except CalibrationError:
        raise
    except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise CalibrationError(f"dataset {str(path)!r} can't be read: {error}") from None


def _parquet(content: Any, limit: UnfoldingLimit) -> ParquetRows:
    try:
        return ParquetRows(content, limit)
    except ImportError:
        raise CalibrationError(
            f"reading {limit.name} needs the package datasets: pip install datasets"
        ) from None
    except CalibrationError:
        raise
    except Exception as error:  # of whichever library reads it
        raise CalibrationError(
            f"{limit.name} can't be read as parquet: {root_cause(error)}"
        ) from error


def root_cause(error: BaseException) -> str:
    """In one line, the error that others were raised from."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(f"{type(error).__name__}: {error}".split())
