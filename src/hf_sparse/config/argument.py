"""One argument of a config: declared once, from which signature, options and tables are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Given = TypeVar("Given")
Held = TypeVar("Held")


def unchecked(name: str, value: Any) -> Any:
    """Anything goes, or whether it does depends on other arguments."""
    return value


class Argument(Generic[Given, Held]):
    """A field of a dataclass that checks what it is given: `name: Argument[Given, Held]`.

    `Given` is what users may pass, `Held` what a config holds of it.

    Attributes:
        default: what holds if it isn't given.
        help: what it says, in sentences, the first of which can stand alone.
        shell_help: the same of its option, which is typed; `help` unless that speaks of Python.
        group: what it belongs to, for lists of options.
        check: from name and value to the value held; raises a ConfigError.
        otherwise: what a default of None stands for, in words.
        name: as it is written.
        kinds: the types that `Given` consists of, without None.
    """

    name: str
    kinds: tuple[Any, ...]

    def __init__(
        self,
        default: Given,
        help: str,
        group: str,
        check: Callable[[str, Any], Any] = unchecked,
        otherwise: str = "none",
        shell_help: str | None = None,
    ) -> None:
        self.default, self.help, self.group = default, help, group
        self.check, self.otherwise = check, otherwise
        self.shell_help = shell_help or help

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Given: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Held: ...
    def __get__(self, instance: object | None, owner: type) -> Given | Held:
        return self.default if instance is None else instance.__dict__[self.name]

    def __set__(self, instance: object, value: Given) -> None:
        instance.__dict__[self.name] = self.check(self.name, value)

    @property
    def default_text(self) -> str:
        """The default, as one would write it; in words where None stands for something."""
        if self.default is None:
            return self.otherwise
        return f'"{self.default}"' if isinstance(self.default, str) else str(self.default)
