"""Names that have changed: the old one still works, and a warning says the new one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def renamed_arguments(**names: str) -> Callable[[Function], Function]:
    """A decorator of a function some of whose keyword arguments have other names now.

    Args:
        names: the old names, and what they are called now.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **current_names(kwargs, names))

        return called  # type: ignore[return-value]

    return decorate


def current_names(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Arguments by the names that they have now; warns the caller's caller of old ones.

    Raises:
        TypeError: one is given by both names.
    """
    for old in names.keys() & given.keys():
        if names[old] in given:
            raise TypeError(f"{old}= is called {names[old]}= now: pass one of them")
        warn_renamed(f"{old}=", f"{names[old]}=", stacklevel=4)
    return {names.get(name, name): value for name, value in given.items()}


def warn_renamed(old: str, new: str, stacklevel: int) -> None:
    """A FutureWarning, at the caller that `stacklevel` counts from here."""
    message = f"{old} is called {new} now: the old name will be removed"
    warnings.warn(message, FutureWarning, stacklevel=stacklevel)
