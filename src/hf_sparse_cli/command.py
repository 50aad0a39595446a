"""What every command shares: a function from options to a result, printed as text or as JSON."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import typer
from typer.core import TyperCommand

from .failures import sentence
from .plain import printable


class Result(Protocol):
    """What a command hands back: `str` of it is the text that people read."""

    def to_dict(self) -> Mapping[str, Any]:
        """Everything as JSON values."""
        ...


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name: as it is typed.
        function: its parameters are the options, its docstring the help.
        examples: lines for the help.
        generated: options that are not in the function's signature; it gets those that were given
            as a dict, in its parameter `settings`.
    """

    name: str
    function: Callable[..., Result]
    examples: Sequence[str]
    generated: Sequence[inspect.Parameter] = ()


class GroupedCommand(TyperCommand):
    """A command whose help lists its options by what they belong to."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for the arguments, the command's own options, and each group."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            own = "Arguments" if param.param_type_name == "argument" else "Options"
            name = getattr(param, "rich_help_panel", None) or own
            if record := param.get_help_record(ctx):
                sections.setdefault(name, []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def one_sentence(debug: bool) -> Iterator[None]:
    """Turn an error into a sentence on stderr and exit code 1, unless `debug`."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if debug:
            raise
        typer.echo(f"Error: {sentence(error)}", err=True)
        raise typer.Exit(1) from None


def register(app: typer.Typer, command: Command) -> None:
    """Add a command to a program."""
    own = inspect.signature(command.function, eval_str=True).parameters
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("as_json", Json), ("debug", Debug))
    ]
    generated = {parameter.name for parameter in command.generated}

    def run(*, as_json: bool, debug: bool, **options: Any) -> None:
        if command.generated:
            given = {name: options.pop(name) for name in generated}
            options["settings"] = {k: v for k, v in given.items() if v not in (None, [])}
        with one_sentence(debug):
            result = command.function(**options)
            # Names and texts come from files: none of them is to move the terminal's cursor.
            plain = printable(str(result), keep="\n")
            text = json.dumps(result.to_dict(), indent=2) if as_json else plain
        sys.stdout.write(text + "\n")

    parameters = [*(p for p in own.values() if p.name != "settings"), *command.generated, *shared]
    by_kind = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(by_kind)  # type: ignore[attr-defined]
    run.__annotations__ = {}
    run.__doc__ = command.function.__doc__
    lines = "\n".join(f"  {line}" for line in command.examples)
    app.command(command.name, cls=GroupedCommand, epilog=f"\b\nexamples:\n{lines}")(run)
