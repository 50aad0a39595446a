"""Checks of one argument: its value as a config holds it, or a ConfigError that names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from ..core.errors import ConfigError
from ..core.json_records import LARGEST_NUMBER
from ..core.module_names import check_regex
from ..core.untrusted_text import brief
from ..core.whole_number import whole_number

Check = Callable[[str, Any], Any]

MOST_REGEXES = 100_000


def optional(check: Check) -> Check:
    """None, or what another check takes."""
    return lambda name, value: None if value is None else check(name, value)


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """One of the values allowed; True and 1 are two."""
    number = whole_number(value)
    held = value if number is None else number
    if not any(type(held) is type(a) and held == a for a in allowed):
        options = " or ".join(map(repr, allowed))
        raise ConfigError(f"{name}={brief(value)} does not exist: pass {options}")
    return held


def text(name: str, value: Any) -> str:
    """A string; which ones there are depends on other arguments."""
    if not isinstance(value, str):
        raise ConfigError(f"{name}={brief(value)} does not exist: pass a string")
    return str(value)


def text_or_pairs(name: str, value: Any) -> Any:
    """A string, or what `fractions` takes."""
    return value if isinstance(value, (Mapping, list)) else text(name, value)


def fraction(name: str, value: Any) -> float:
    """A sparsity, 0 <= s < 1."""
    number = _is_number(value)
    if not number or not 0 <= value < 1:
        hint = f"; for {value} % pass {value / 100}" if number and 1 < value < 100 else ""
        raise ConfigError(
            f"{name}={brief(value)} must be the fraction of zeros, a number with 0 <= s < 1{hint}"
        )
    return float(value)


def share(name: str, value: Any) -> float:
    """A part of something that isn't all of it, 0 < s < 1."""
    number = _is_number(value)
    if not number or not 0 < value < 1:
        hint = f"; for {value} % pass {value / 100}" if number and 1 < value < 100 else ""
        raise ConfigError(f"{name}={brief(value)} must be a share, a number with 0 < s < 1{hint}")
    return float(value)


def integer(name: str, value: Any, least: int) -> int:
    """An integer from `least` on, below 2^63."""
    number = whole_number(value)
    if number is None or not least <= number < LARGEST_NUMBER:
        most = ", below 2^63" if number is not None and number >= LARGEST_NUMBER else ""
        raise ConfigError(f"{name}={brief(value)} must be an integer of at least {least}{most}")
    return number


def group_width(name: str, value: Any) -> int:
    """Inputs that share a scale: a number of whole bytes of bits, or -1 for all of a row."""
    number = whole_number(value)
    if number is None or (number != -1 and (number % 8 or not 8 <= number < LARGEST_NUMBER)):
        raise ConfigError(
            f"{name}={brief(value)} must be a multiple of 8, e.g. 128, or -1 for one scale a row"
        )
    return number


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    if not _is_number(value) or not 0 < value < LARGEST_NUMBER:
        raise ConfigError(f"{name}={brief(value)} must be a positive number")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def regexes(name: str, patterns: Any) -> list[str]:
    """A list of valid regexes."""
    listed = isinstance(patterns, (list, tuple, set, frozenset))
    if not listed or not all(isinstance(p, str) for p in patterns):
        raise ConfigError(
            f"{name}={brief(patterns)} must be a list of regexes, e.g. ['q_proj', 'mlp']"
        )
    if len(patterns) > MOST_REGEXES:
        raise ConfigError(f"{name} holds {len(patterns)} regexes: expected {MOST_REGEXES} at most")
    for pattern in patterns:
        if fault := check_regex(pattern):
            raise ConfigError(f"{name} holds {brief(pattern)}, {fault}")
    return list(patterns)


def fractions(name: str, value: Any) -> dict[str, float]:
    """`{regex: fraction}`, or in JSON, which sorts an object's keys, a list of such pairs."""
    if isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 for p in value):
        regexes(name, [pair[0] for pair in value])
        value = dict(value)
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"{name}={brief(value)} names no layer: pass {{regex: fraction}}")
    regexes(name, list(value))
    return {key: fraction(f"{name}[{brief(key)}]", s) for key, s in value.items()}
