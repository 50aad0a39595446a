"""Cases that take less time than pytest takes for a test, in one test."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any


def in_one_test(**values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Calls a test with every combination of its arguments' values; a failure names the one."""

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def all_cases(**others: Any) -> None:
            for case in itertools.product(*values.values()):
                given = dict(zip(values, case, strict=True))
                try:
                    test(**given, **others)
                except Exception as error:
                    error.add_note(f"with {given}")
                    raise

        parameters = inspect.signature(test).parameters.values()
        rest = [each for each in parameters if each.name not in values]
        all_cases.__signature__ = inspect.Signature(rest)  # what pytest gives
        return all_cases

    return decorated
