"""Options of the command line made from the arguments of `SparseConfig`, one for each."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from .failures import Failure
from .plain import ARGUMENTS, RENAMED, Argument, parse_json, unknown_arguments
from .sections import METHOD

if TYPE_CHECKING:
    from hf_sparse import SparseConfig

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML or JSON file of arguments, named as the options are; options win.",
        rich_help_panel=METHOD,
    ),
]
RENAMED_OPTIONS = {
    f"--{old.replace('_', '-')}": f"--{new.replace('_', '-')}" for old, new in RENAMED.items()
}

_SIMPLE = {bool: bool, int: int, float: float, str: str, Any: str, Sequence[str]: list[str]}


def config_parameters() -> list[inspect.Parameter]:
    """The options of all arguments."""
    return [parameter(argument) for argument in ARGUMENTS.values()]


def parameter(argument: Argument[Any, Any]) -> inspect.Parameter:
    """An argument's option, as a function's parameter; None, or an empty list, if not given."""
    option = f"--{argument.name.replace('_', '-')}"
    kind, metavar = option_type(argument), None
    if kind is bool:
        option += f"/--no-{option[2:]}"
    text = f"{argument.shell_help}  [default: {_shell_default(argument)}]"
    if kind == list[str]:
        metavar, text = "TEXT", f"May be repeated. {text}"
    elif takes_json(argument):
        metavar = "VALUE|JSON"
    return inspect.Parameter(
        argument.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            kind | None,
            typer.Option(
                option,
                help=text,
                metavar=metavar,
                show_default=False,
                rich_help_panel=argument.group.capitalize(),
            ),
        ],
    )


def _shell_default(argument: Argument[Any, Any]) -> str:
    """The default as one would type it."""
    if isinstance(argument.default, bool):
        option = argument.name.replace("_", "-")
        return f"--{option}" if argument.default else f"--no-{option}"
    return argument.default_text.replace('"', "")


def takes_json(argument: Argument[Any, Any]) -> bool:
    """Is its option's value JSON (or else a plain string)?"""
    return len(argument.kinds) != 1


def option_type(argument: Argument[Any, Any]) -> Any:
    """What typer makes of the option's value."""
    return str if takes_json(argument) else _SIMPLE[argument.kinds[0]]


def option_value(argument: Argument[Any, Any], given: Any) -> Any:
    """The argument for an option's value."""
    if not takes_json(argument):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return given


def make_config(settings: Mapping[str, Any], file: Path | None) -> SparseConfig:
    """The config that options and a file describe; see `make_arguments`.

    Raises:
        ConfigError: the config's own, about a value.
    """
    arguments = make_arguments(settings, file)
    from hf_sparse import SparseConfig

    return SparseConfig(**arguments)


def make_arguments(settings: Mapping[str, Any], file: Path | None) -> dict[str, Any]:
    """The arguments of `SparseConfig` that options and a file give; options win.

    Args:
        settings: values of the options that were given, by argument.
        file: YAML or JSON with more arguments.

    Raises:
        Failure: the file can't be used.
    """
    arguments = {} if file is None else read_file(file)
    options = {name: option_value(ARGUMENTS[name], given) for name, given in settings.items()}
    return arguments | options


def read_file(file: Path) -> dict[str, Any]:
    """The arguments in a config file."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"--config {file} can't be read: {error}") from None
    if file.suffix == ".json":
        content = parse_json(text, f"--config {file}", Failure)
    else:
        try:
            content = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise Failure(f"--config {file} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise Failure(f"--config {file} holds a {type(content).__name__}: expected `name: value`")
    content.pop("quant_method", None)  # what SparseConfig.to_dict() writes can be passed as it is
    named: dict[str, Any] = {RENAMED.get(str(n), str(n)): value for n, value in content.items()}
    if unknown := [name for name in named if name not in ARGUMENTS]:
        raise Failure(f"--config {file}: {unknown_arguments(unknown)}")
    return named
