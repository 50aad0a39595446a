"""Plug-ins of one kind by name: checked when they are registered, found by name or near name."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Generic, TypeVar

from .errors import ConfigError, RegistrationError
from .untrusted_text import brief

T = TypeVar("T")

# Names are typed in shells and stand in tables, files' JSON and error messages.
NAME = re.compile(r"[A-Za-z0-9][\w.:+-]*", re.ASCII)


class Registry(Mapping[str, type[T]], Generic[T]):
    """Classes of one kind by their `name`, in order; read like a dict.

    Args:
        kind: what they are, in a word, for errors: "method", "format", ...
        base: the abstract class that they derive from.
        classes: the package's own.
        check: raises a RegistrationError unless a class is what this kind needs besides.
        reserved: names that mean something else.
    """

    def __init__(
        self,
        kind: str,
        base: type[T],
        classes: Iterable[type[T]],
        check: Callable[[type[T]], None] = lambda cls: None,
        reserved: Iterable[str] = (),
    ) -> None:
        self.kind, self._base, self._check = kind, base, check
        self._reserved = frozenset(reserved)
        self._classes: dict[str, type[T]] = {}
        for cls in classes:
            self.register(cls)

    def register(self, cls: type[T], before: str | None = None) -> type[T]:
        """Add a class under its `name`; returns it, so that this is a decorator too.

        Args:
            cls: the class.
            before: name of the one that it stands before; None: behind all others.

        Raises:
            RegistrationError: it is no subclass of the base, is abstract, has no usable name, or
                one that is taken.
            ConfigError: nothing is called `before`.
        """
        base = self._base.__name__
        if not (inspect.isclass(cls) and issubclass(cls, self._base)):
            raise RegistrationError(f"{cls!r} is no subclass of {base}: derive the class from it")
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            raise RegistrationError(
                f"{cls.__name__} lacks {', '.join(missing)}: implement all that {base} asks for"
            )
        name: Any = getattr(cls, "name", None)
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise RegistrationError(
                f"{cls.__name__}.name is {name!r}: give the class a name of letters, digits and "
                "any of _ . : + -, beginning with a letter or digit"
            )
        if name in self._reserved:
            raise RegistrationError(f"{self.kind} {name!r} means something else: take another name")
        if name in self._classes:
            taken = self._classes[name]
            raise RegistrationError(
                f"{self.kind} {name!r} exists already, {taken.__module__}.{taken.__qualname__}: "
                f"take another name. Taken are {', '.join(self)}"
            )
        self._check(cls)
        if before is not None:
            self.find(before)
        behind = list(self)[list(self).index(before) :] if before is not None else []
        moved = {each: self._classes.pop(each) for each in behind}
        self._classes |= {name: cls, **moved}
        return cls

    def find(self, name: object) -> type[T]:
        """The class of a name, or a ConfigError that says which names exist and which is near."""
        if isinstance(name, str) and name in self._classes:
            return self._classes[name]
        raise ConfigError(unknown_name(self.kind, name, self))

    def __getitem__(self, name: str) -> type[T]:
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


def check_frozen(cls: type) -> None:
    """Raise a RegistrationError unless a class is a frozen dataclass."""
    if not (is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise RegistrationError(f"{cls.__name__} must be a @dataclass(frozen=True)")


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """In words: there is no such thing, did you mean ..., and all that there is."""
    known = list(known)
    near = did_you_mean(name, known)
    hint = f"; {near} Pass" if near else ": pass"
    return f"{what}={brief(name)} does not exist{hint} one of {', '.join(known)}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """In words, the known name that is nearest; "" if none is near."""
    near = difflib.get_close_matches(name, list(known), 1) if isinstance(name, str) else []
    return f"did you mean {near[0]!r}?" if near else ""
