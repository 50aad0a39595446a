"""JSON that nobody vouches for: read within bounds, and turned into frozen dataclasses.

`json` itself raises RecursionError for what is nested too deep and ValueError for an integer of
too many digits, takes NaN and Infinity, and gives strings that no file can hold. What is read
here raises the error that the caller names, and holds finite numbers and Unicode only.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from .errors import CheckpointError
from .untrusted_text import printable

T = TypeVar("T")

LARGEST_FILE = 100_000_000  # bytes; what safetensors allows a header
DEPTH = 64  # objects and arrays inside each other
LARGEST_NUMBER = 2**63

_hints = cache(get_type_hints)  # a report may have tens of thousands of layers


def read_json(
    path: str | os.PathLike[str],
    error: type[Exception] = CheckpointError,
    *,
    any_number: bool = False,
    largest: int = LARGEST_FILE,
) -> Any:
    """The content of a JSON file.

    Args:
        path: of a regular file.
        error: what is raised if it can't be used; names the file.
        any_number: as for `parse_json`.
        largest: bytes.

    Raises:
        FileNotFoundError: there is nothing at this path.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise error(f"{path} is no file")
        if size > largest:
            raise error(f"{path} has {size} bytes: expected {largest} at most")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"{path} can't be read: {cause}") from None
    return parse_json(text, str(path), error, any_number=any_number)


def parse_json(
    text: str,
    where: str,
    error: type[Exception] = CheckpointError,
    *,
    any_number: bool = False,
) -> Any:
    """The value that a JSON text describes.

    Args:
        text: JSON.
        where: what is read, for the error.
        error: what is raised if it can't be used.
        any_number: take NaN, infinities and numbers beyond 2^63, too.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as cause:
        reason = "it is nested too deep" if isinstance(cause, RecursionError) else str(cause)
        raise error(f"{where} is not JSON that can be used: {reason}") from None
    if fault := _fault(value, any_number):
        raise error(f"{where} is not JSON that can be used: {fault}")
    return value


def _fault(value: Any, any_number: bool) -> str | None:
    """What can't be used of a value, level by level."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH:
            return f"it is nested more than {DEPTH} deep"
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                if not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                    return f"a string is no Unicode: {item!a:.80}"
            elif isinstance(item, (int, float)) and not (any_number or is_measure(abs(item))):
                return f"a number is beyond 2^63 or not finite: {_brief(item)}"
        level = below
    return None


def json_text(content: Any) -> str:
    """Values as JSON that every reader takes: a number that isn't finite is null there."""
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_measure(value: float) -> bool:
    """Is a number finite, not negative, and small enough to be added up and multiplied?"""
    return 0 <= value <= LARGEST_NUMBER  # compared exactly, whatever an integer's size


def _brief(value: float) -> str:
    """A number, however long."""
    many = isinstance(value, int) and value.bit_length() > 200
    return "a number of many digits" if many else repr(value)


def read_record(kind: type[T], content: Any, where: str) -> T:
    """The value of a dataclass that JSON describes.

    Keys that the class has no field for are left out, so that a newer version's file can be read.
    What in strings is no character to be seen is replaced by its escape.

    Args:
        kind: a dataclass of strings, finite numbers, bools, tuples, mappings and dataclasses.
        content: what `parse_json` gave.
        where: what is read, for the error.

    Raises:
        CheckpointError: a field is missing, or of another type, or a number is negative or beyond
            2^63.
    """
    return cast(T, _read(kind, content, where))


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        (kind,) = [argument for argument in arguments if argument is not NoneType]
        return _read(kind, value, where)
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if origin is Mapping:
        entries = _require(dict, value, where).items()
        return {printable(k): _read(arguments[1], v, f"{where}, {k}") for k, v in entries}
    if is_dataclass(kind):
        return _read_fields(kind, _require(dict, value, where), where)
    if not (kind is float and type(value) is int):
        _require(kind, value, where)
    if kind is str:
        return printable(value)
    if kind in (int, float):
        if not is_measure(value):
            raise CheckpointError(f"{where}: {_brief(value)} is no count or measure")
        return kind(value)
    return value


def _read_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    items = _require(list, value, where)
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(items)
    if len(items) != len(arguments):
        raise CheckpointError(f"{where}: {len(items)} values, expected {len(arguments)}")
    pairs = enumerate(zip(arguments, items, strict=True))
    return tuple(_read(kind, item, f"{where}, {i}") for i, (kind, item) in pairs)


def _read_fields(kind: Any, content: Mapping[str, Any], where: str) -> Any:
    hints = _hints(kind)
    values = {}
    for field in fields(kind):
        if field.name in content:
            place = f"{where}, {field.name}"
            values[field.name] = _read(hints[field.name], content[field.name], place)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise CheckpointError(f"{where}: {field.name} is missing")
    return kind(**values)


def _require(kind: type, value: Any, where: str) -> Any:
    if type(value) is not kind:
        found = _brief(value) if isinstance(value, int) else f"{value!a:.80}"
        raise CheckpointError(f"{where}: {found} is no {kind.__name__}")
    return value
