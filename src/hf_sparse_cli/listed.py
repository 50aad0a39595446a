"""Options that take several values, separated by commas."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import typer

Item = TypeVar("Item")


def listed(option: str, text: str, convert: Callable[[str], Item]) -> tuple[Item, ...]:
    """The values of an option that takes several, separated by commas.

    Raises:
        typer.BadParameter: one of them can't be converted.
    """
    try:
        return tuple(convert(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """A conversion that takes some names alone."""

    def convert(text: str) -> str:
        if text not in known:
            raise ValueError(f"{text!r} is not one of {', '.join(known)}")
        return text

    return convert


def fraction(text: str) -> float:
    """A sparsity, 0 <= s < 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError(f"{text} is no fraction of zeros: pass 0 <= s < 1")
    return value


def count(text: str) -> int:
    """An integer from 1 on."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise ValueError(f"{text!r} is no count: pass an integer of at least 1")
    return int(text)


def shape(text: str) -> tuple[int, int]:
    """ "OUTxIN" to (out, in)."""
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise ValueError(f"{text!r} is no shape: pass OUTxIN, e.g. 4096x11008")
    return count(rows), count(columns)
