"""Cases that take less time than pytest takes for a test, in one test."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def in_one_test(**values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Calls a test with every combination of its arguments' values; a failure names the one.

    What skips one of them doesn't skip the others: the test is skipped if none runs.
    """

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def all_cases(**others: Any) -> None:
            skipped, ran = None, False
            for case in itertools.product(*values.values()):
                given = dict(zip(values, case, strict=True))
                try:
                    test(**given, **others)
                    ran = True
                except pytest.skip.Exception as reason:
                    skipped = reason
                except Exception as error:
                    error.add_note(f"with {given}")
                    raise
            if skipped is not None and not ran:
                raise skipped

        parameters = inspect.signature(test).parameters.values()
        rest = [each for each in parameters if each.name not in values]
        all_cases.__signature__ = inspect.Signature(rest)  # what pytest gives
        return all_cases

    return decorated
