"""docs/commands.md; `python tests/helpers/command_pages.py` writes it anew."""

import inspect
import re
from pathlib import Path

import typer

from hf_sparse_cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
HEAD = """# All commands and options

Made from the program itself, `hf-sparse COMMAND --help`; [how they go together](command-line.md).
"""


def command_page() -> str:
    """A section for each command: what it does, and a table of its options by group."""
    program = typer.main.get_command(app)
    parts = [HEAD]
    for name, command in program.commands.items():
        inner = getattr(command, "commands", None)
        parts += [_section(f"{name} {x}", c) for x, c in inner.items()] if inner else [
            _section(name, command)
        ]  # fmt: skip
    return "\n".join(parts)


def _section(name: str, command) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    lines = [f"## {name}", "", _words(inspect.cleandoc(command.help or "")), ""]
    rows = []
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record and param.name not in ("help", "as_json", "quiet", "debug"):
            rows.append(
                f"| `{_words(record[0]).replace('|', chr(92) + '|')}` | {_words(record[1])} |"
            )
    if rows:
        lines += ["| option | |", "|---|---|", *rows]
    return "\n".join(lines).rstrip() + "\n"


def _words(text: str) -> str:
    text = re.sub(r"(?<=\S)  +(?=\S)", " ", text.replace("\n\n", "\0").replace("\n", " "))
    return text.replace("\0", "\n\n").replace("|JSON", " or JSON").replace("<", "").replace(">", "")


if __name__ == "__main__":
    PAGE.write_text(command_page(), encoding="utf-8")
