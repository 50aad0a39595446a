"""Regexes that select modules by whole components of their dotted names.

They may come with a stranger's config, so neither compiling nor matching one may take for ever:
they are bounded in length and in repetitions, and one that needs more than a second for a name, or
ten for all of a model's, is an error. They are what Python's `re` reads. `re` itself can't be
stopped, so the package `regex`, which transformers needs too, does the matching.
"""

from __future__ import annotations

import difflib
import math
import re
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import regex

from .errors import TargetError
from .untrusted_text import brief

LONGEST_REGEX = 1000
MOST_REPETITIONS = 10_000  # of those inside each other, {n} times {m}
SECONDS = 1.0  # of processor time, for one name
SECONDS_IN_ALL = 10.0  # for all names that it takes notably long for
NOTABLE = 0.01

# What each regex has taken.
_taken: dict[str, float] = {}


def matches(pattern: str, name: str) -> bool:
    """Does the regex match whole components of a dotted name?

    Raises:
        TargetError: that takes more than a second to find out, or more memory than there is.
    """
    return _search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", pattern, name)


def ends_with(pattern: str, name: str) -> bool:
    """Does the regex match the last components of a dotted name, down to its end?

    Raises:
        TargetError: that takes more than a second to find out, or more memory than there is.
    """
    return _search(rf"(?:^|\.)(?:{pattern})$", pattern, name)


def _search(whole: str, pattern: str, name: str) -> bool:
    taken = _taken.get(pattern, 0.0)
    started = time.process_time()
    limit = min(SECONDS, SECONDS_IN_ALL - taken)
    try:
        return _compiled(whole).search(name, timeout=limit) is not None
    except TimeoutError:
        raise TargetError(
            f"the regex {brief(pattern)} takes more than {SECONDS:g} s to match {brief(name)}, or "
            f"{SECONDS_IN_ALL:g} s for all names: write it without repetitions inside each other"
        ) from None
    except (regex.error, RecursionError, MemoryError) as error:
        raise TargetError(f"the regex {brief(pattern)} can't be used: {error}") from None
    finally:
        if (seconds := time.process_time() - started) > NOTABLE:
            _taken[pattern] = min(taken + seconds, SECONDS_IN_ALL - NOTABLE)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


def check_regex(pattern: str) -> str | None:
    """What is wrong with a regex, in words; None if it can be used."""
    if len(pattern) > LONGEST_REGEX:
        return f"a regex of {len(pattern)} letters: expected {LONGEST_REGEX} at most"
    if pattern.replace(".", "").replace("_", "").isalnum():
        return None  # a plain name, of which there may be thousands
    try:
        re.compile(f"(?:{pattern})")
    except (re.error, RecursionError, OverflowError) as error:
        return f"no valid regex: {error}"
    counts = [int(n) for n in re.findall(r"(\d+),?\}", pattern)]
    if math.prod(counts) > MOST_REPETITIONS:
        return f"a regex that asks for {counts} repetitions: expected {MOST_REPETITIONS} at most"
    return None


def near_names(pattern: str, names: Iterable[str], kind: str) -> str:
    """In words: names, or parts of them, like a pattern that matches none; else some names."""
    names = list(names)
    words = dict.fromkeys(part for name in names for part in (name, *name.split(".")))
    near = difflib.get_close_matches(pattern, [w for w in words if not w.isdigit()], 4, 0.5)
    return f"near names: {', '.join(near)}" if near else f"{kind} are e.g. {', '.join(names[:4])}"
