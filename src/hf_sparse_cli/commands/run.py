"""`hf-sparse run COMMAND...`: another program, whose transformers reads sparse checkpoints."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

from ..command import Command
from ..startup import become


def run(
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND...", help="A program and its arguments.")
    ],
) -> NoReturn:
    """Run a program on sparse checkpoints.

    transformers reads them once hf_sparse has been imported. This has it imported in every Python
    that the program starts, so that pipelines, servers and lm-eval need no import of your own.
    """
    become(command)


COMMAND = Command(
    "run",
    run,
    (
        "hf-sparse run lm_eval run --model hf --model_args pretrained=opt-sparse --tasks arc_easy",
        "hf-sparse run python generate.py",
        "hf-sparse run transformers serve opt-sparse",
    ),
    hands_over=True,
)
