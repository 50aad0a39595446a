"""One argument of a config: as it is to be held, or a ConfigError that names it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from ..core.errors import ConfigError


def from_pairs(value: Any) -> Any:
    """`{regex: s}` is written as a list of pairs in JSON, which sorts an object's keys."""
    pairs = isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 for p in value)
    return dict(value) if pairs else value


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """One of the values allowed; True and 1 are two."""
    if not any(value is a if isinstance(a, bool) else value == a for a in allowed):
        options = " or ".join(map(repr, allowed))
        raise ConfigError(f"{name}={value!r} does not exist: pass {options}")
    return value


def fraction(name: str, value: object) -> float:
    """A sparsity, 0 <= s < 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        percent = isinstance(value, (int, float)) and 1 < value < 100
        hint = f"; for {value} % pass {value / 100}" if percent else ""  # type: ignore[operator]
        raise ConfigError(
            f"{name}={value!r} must be the fraction of zeros, a number with 0 <= s < 1{hint}"
        )
    return float(value)


def integer(name: str, value: object, least: int) -> int:
    """An integer from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} must be an integer of at least {least}")
    return value


def group_width(value: object) -> int:
    """Inputs that share a scale: a number of whole bytes of bits, or -1 for all of a row."""
    if value == -1 and not isinstance(value, bool):
        return -1
    if isinstance(value, bool) or not isinstance(value, int) or value < 8 or value % 8:
        raise ConfigError(
            f"group_size={value!r} must be a multiple of 8, e.g. 128, or -1 for one scale a row"
        )
    return value


def positive(name: str, value: object) -> float:
    """A finite number above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ConfigError(f"{name}={value!r} must be a positive number")
    return float(value)  # type: ignore[arg-type]


def regexes(name: str, patterns: Sequence[str] | None) -> list[str] | None:
    """A list of valid regexes, or None."""
    if patterns is None:
        return None
    listed = isinstance(patterns, (list, tuple, set, frozenset))
    if not listed or not all(isinstance(p, str) for p in patterns):
        raise ConfigError(f"{name}={patterns!r} must be a list of regexes, e.g. ['q_proj', 'mlp']")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{name} holds {pattern!r}, no valid regex: {error}") from None
    return list(patterns)
