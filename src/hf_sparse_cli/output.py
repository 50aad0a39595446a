"""Where commands write to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .failures import Failure

Output = Annotated[Path, typer.Option(help="Folder to write the checkpoint to.")]


def check_output(folder: Path) -> None:
    """Raise a Failure if a folder can't be written: better before the work than after it."""
    if folder.exists() and not folder.is_dir():
        raise Failure(f"--output {folder} is a file: pass a folder")
    parent = next(path for path in folder.absolute().parents if path.exists())
    for place in (parent, folder):
        if place.exists() and not (place.is_dir() and os.access(place, os.W_OK)):
            raise Failure(f"--output {folder}: nothing can be written in {place}")
