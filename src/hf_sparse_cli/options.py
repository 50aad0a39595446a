"""Options of the command line made from `SparseConfig`: one for each of its arguments.

Names, types and help come from the class's own signature and docstring. They are read from its
source: importing it would load torch for a mere `--help`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from .failures import Failure

if TYPE_CHECKING:
    from hf_sparse import SparseConfig

_SIMPLE: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "Any": str}
_LISTS = {"Sequence[str]", "list[str]"}


@dataclass(frozen=True)
class Argument:
    """An argument of `SparseConfig.__init__`.

    Attributes:
        name: its name; the option's has dashes for underscores.
        kinds: what its annotation allows besides None, as it is written there.
        text: what the docstring says about it.
    """

    name: str
    kinds: tuple[str, ...]
    text: str

    @property
    def is_json(self) -> bool:
        """Is its option's value JSON (or else a plain string)?"""
        return len(self.kinds) != 1 or self.kinds[0] not in {*_SIMPLE, *_LISTS}

    def parameter(self) -> inspect.Parameter:
        """Its option, as a function's parameter; None, or an empty list, if it isn't given."""
        option = f"--{self.name.replace('_', '-')}"
        kind: Any = str
        metavar = None
        if self.is_json:
            metavar = "VALUE|JSON"
        elif self.kinds[0] in _LISTS:
            kind, metavar = list[str], "TEXT"
        else:
            kind = _SIMPLE[self.kinds[0]]
        if kind is bool:
            option += f"/--no-{option[2:]}"
        text = self.text[:1].upper() + self.text[1:]
        text += " May be repeated." if kind == list[str] else ""
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                kind | None, typer.Option(option, help=text, metavar=metavar, show_default=False)
            ],
        )

    def value(self, given: Any) -> Any:
        """The argument for an option's value."""
        if not self.is_json:
            return given
        try:
            return json.loads(given)
        except json.JSONDecodeError:
            return given


@cache
def config_arguments() -> dict[str, Argument]:
    """All arguments of `SparseConfig`, by name."""
    spec = find_spec("hf_sparse")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(
        (Path(spec.origin).parent / "config" / "sparse_config.py").read_text(encoding="utf-8")
    )
    found = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "SparseConfig")
    config = next(found)
    init = next(n for n in config.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    texts = _documented(ast.get_docstring(config) or "")
    arguments = [*init.args.args, *init.args.kwonlyargs][1:]  # without self
    return {a.arg: Argument(a.arg, _kinds(a.annotation), texts.get(a.arg, "")) for a in arguments}


def config_parameters() -> list[inspect.Parameter]:
    """The options of all arguments."""
    return [argument.parameter() for argument in config_arguments().values()]


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
    options = {name: config_arguments()[name].value(given) for name, given in settings.items()}
    return arguments | options


def read_file(file: Path) -> dict[str, Any]:
    """The arguments in a config file."""
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"--config {file} can't be read: {error}") from None
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        kind = "JSON" if file.suffix == ".json" else "YAML"
        raise Failure(f"--config {file} is no {kind}: {error}") from None
    if not isinstance(content, dict):
        raise Failure(f"--config {file} holds a {type(content).__name__}: expected `name: value`")
    content.pop("quant_method", None)  # what SparseConfig.to_dict() writes can be passed as it is
    known = config_arguments()
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1) or list(known)
            hint = f"did you mean {near[0]!r}?" if len(near) == 1 else f"it has {', '.join(near)}"
            raise Failure(f"--config {file}: SparseConfig has no {name!r}; {hint}")
    return content


def _kinds(annotation: ast.expr | None) -> tuple[str, ...]:
    """The parts of a union, without None."""
    if isinstance(annotation, ast.BinOp):
        return (*_kinds(annotation.left), *_kinds(annotation.right))
    text = "Any" if annotation is None else ast.unparse(annotation)
    return () if text == "None" else (text,)


def _documented(doc: str) -> dict[str, str]:
    """The entries of a docstring's section Args, each in one line."""
    texts: dict[str, str] = {}
    for line in doc.partition("Args:\n")[2].splitlines():
        if entry := re.match(r" {4}(\w+): (.*)", line):
            texts[entry[1]] = entry[2]
        elif line.startswith("     ") and texts:
            texts[next(reversed(texts))] += f" {line.strip()}"
        elif line.strip():
            break
    return texts
