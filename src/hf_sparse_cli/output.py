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
    _check_writable(folder)


def check_output_file(file: Path) -> None:
    """Raise a Failure if a file can't be written."""
    if file.is_dir():
        raise Failure(f"--output {file} is a folder: pass a file")
    _check_writable(file)


def _check_writable(path: Path) -> None:
    parent = next(p for p in path.absolute().parents if p.exists())
    places = [path] if path.is_dir() else [parent, path] if path.exists() else [parent]
    for place in places:
        if not os.access(place, os.W_OK) or (place is parent and not parent.is_dir()):
            raise Failure(f"--output {path}: nothing can be written in {place}")
