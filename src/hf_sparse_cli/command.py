"""What every command shares: a function from options to a result, printed as text or as JSON."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol

import typer
from typer.core import TyperCommand

from .failures import sentence
from .plain import printable
from .quiet import be_quiet, is_quiet
from .sections import ARGUMENTS, OPTIONS, OTHER, SECTIONS


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
        renamed: options that have another name now, old to new; the old ones still work.
        hands_over: another program takes this one's place, so that there is no result; what
            follows the first argument is that program's, options included.
    """

    name: str
    function: Callable[..., Result]
    examples: Sequence[str]
    generated: Sequence[inspect.Parameter] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    hands_over: bool = False


class GroupedCommand(TyperCommand):
    """A command whose help lists its options by what they belong to.

    Attributes:
        renamed: as `Command`'s.
    """

    renamed: ClassVar[Mapping[str, str]] = {}

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for the arguments and for each group of options."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in SECTIONS}
        for param in self.get_params(ctx):
            own = ARGUMENTS if param.param_type_name == "argument" else OPTIONS
            name = OTHER if param.name == "help" else getattr(param, "rich_help_panel", None) or own
            if record := param.get_help_record(ctx):
                sections[name].append(record)
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does, with new names in the place of old ones; tells them on stderr."""
        end = args.index("--") if "--" in args else len(args)
        for i, given in enumerate(args[:end]):
            old, equals, value = given.partition("=")
            if new := self.renamed.get(old):
                note(f"{old} is called {new} now: the old name will be removed")
                args[i] = new + equals + value
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


Json = Annotated[
    bool,
    typer.Option("--json", help="Print JSON on stdout, for machines.", rich_help_panel=OTHER),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", help="No progress bars, notes and warnings on stderr.", rich_help_panel=OTHER
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OTHER)
]


def note(text: str) -> None:
    """Tell the user something on stderr, unless `--quiet`."""
    if not is_quiet():
        typer.echo(text, err=True)


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
        for name, kind in {"as_json": Json, "quiet": Quiet, "debug": Debug}.items()
        if not (command.hands_over and name == "as_json")
    ]
    generated = {parameter.name for parameter in command.generated}

    def run(*, quiet: bool, debug: bool, as_json: bool = False, **options: Any) -> None:
        if quiet:
            be_quiet()
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
    kind = type("Named", (GroupedCommand,), {"renamed": command.renamed})
    app.command(
        command.name,
        cls=kind,
        epilog=f"\b\nexamples:\n{lines}",
        context_settings={"allow_interspersed_args": not command.hands_over},
    )(run)
