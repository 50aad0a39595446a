"""Whole numbers that users pass: Python's, and NumPy's, as a sweep over an array gives them."""

from __future__ import annotations

from numbers import Integral


def whole_number(value: object) -> int | None:
    """A whole number as an int; None for anything else, True and False among it."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
