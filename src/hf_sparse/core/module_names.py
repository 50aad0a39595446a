"""Regexes that select modules by whole components of their dotted names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def matches(pattern: str, name: str) -> bool:
    """Does the regex match whole components of a dotted name?"""
    return re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", name) is not None


def ends_with(pattern: str, name: str) -> bool:
    """Does the regex match the last components of a dotted name, down to its end?"""
    return re.search(rf"(?:^|\.)(?:{pattern})$", name) is not None


def near_names(pattern: str, names: Iterable[str], kind: str) -> str:
    """In words: names, or parts of them, like a pattern that matches none; else some names."""
    names = list(names)
    words = dict.fromkeys(part for name in names for part in (name, *name.split(".")))
    near = difflib.get_close_matches(pattern, [w for w in words if not w.isdigit()], 4, 0.5)
    return f"near names: {', '.join(near)}" if near else f"{kind} are e.g. {', '.join(names[:4])}"
