"""Frozen dataclasses from JSON that nobody vouches for: every field's type is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from .errors import CheckpointError

T = TypeVar("T")

_hints = cache(get_type_hints)  # a report may have tens of thousands of layers


def read_record(kind: type[T], content: Any, where: str) -> T:
    """The value of a dataclass that JSON describes.

    Keys that the class has no field for are left out, so that a newer version's file can be read.

    Args:
        kind: a dataclass of strings, finite numbers, bools, tuples, mappings and dataclasses.
        content: what `json.loads` gave.
        where: what is read, for the error.

    Raises:
        CheckpointError: a field is missing, or of another type, or a number is negative.
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
        return {k: _read(arguments[1], v, f"{where}, {k}") for k, v in entries}
    if is_dataclass(kind):
        return _read_fields(kind, _require(dict, value, where), where)
    if kind is float and type(value) is int:
        value = float(value)
    _require(kind, value, where)
    if kind in (int, float) and not (math.isfinite(value) and value >= 0):
        raise CheckpointError(f"{where}: {value} is no count or measure")
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
        raise CheckpointError(f"{where}: {value!r:.80} is no {kind.__name__}")
    return value
