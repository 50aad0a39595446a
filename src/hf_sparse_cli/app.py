"""The program: its commands, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from .command import register
from .commands import COMMANDS, bench
from .version import print_version

HELP = """Prune language models in one shot, and store, measure and run them sparse.

\b
examples:
  hf-sparse prune facebook/opt-125m --sparsity 0.5 --dataset wikitext2 --output opt-sparse
  hf-sparse inspect opt-sparse
  hf-sparse eval opt-sparse --dense facebook/opt-125m --dataset wikitext2
  hf-sparse compare facebook/opt-125m --methods wanda,fast --sparsities 0.5,2:4 \\
    --dataset wikitext2 --eval-dataset wikitext2 --output compared
  hf-sparse explain opt-sparse
  hf-sparse export opt-sparse --format dense --output opt-dense
  hf-sparse serve opt-sparse

\b
exit codes: 0 done, 1 failed (one sentence on stderr), 2 unknown or missing options
"""

app = typer.Typer(
    name="hf-sparse",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    register(app, command)
benchmarks = typer.Typer(
    help="Time sparse against dense on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for command in bench.COMMANDS:
    register(benchmarks, command)
app.add_typer(benchmarks, name="bench")


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True),
    ] = False,
) -> None:
    """What comes before a command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends in SystemExit with the exit code.

    Args:
        arguments: without the program's name; None for those of the process.
    """
    app(None if arguments is None else list(arguments), prog_name="hf-sparse")
