"""docs/arguments.md's table; `python tests/helpers/argument_table.py` writes it anew."""

import re
from pathlib import Path

from hf_sparse_cli.plain import ARGUMENTS

PAGE = Path(__file__).parents[2] / "docs" / "arguments.md"
HEAD = "| argument | default | meaning |\n|---|---|---|\n"


def argument_table() -> str:
    """A row for each argument: name, default, and the first sentence of its help."""
    return HEAD + "".join(
        f"| `{a.name}` | {_default(a)} | {_first_sentence(a.help)} |\n" for a in ARGUMENTS.values()
    )


def _default(argument) -> str:
    return argument.otherwise if argument.default is None else f"`{argument.default_text}`"


def _first_sentence(text: str) -> str:
    return re.split(r"\.(?: (?=[A-Z\"])|$)", text)[0].replace("|", "\\|")


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    old = re.search(re.escape(HEAD) + r"(?:\|.*\n)*", text)
    PAGE.write_text(text.replace(old[0], argument_table()), encoding="utf-8")
