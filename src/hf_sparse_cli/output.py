"""Where commands write to: nothing of the user's is overwritten unasked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .failures import Failure
from .sections import OUTPUT

Output = Annotated[
    Path, typer.Option(help="Folder to write the checkpoint to.", rich_help_panel=OUTPUT)
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Write into a folder that isn't empty, or over a file; files of other names stay.",
        rich_help_panel=OUTPUT,
    ),
]


def check_output(folder: Path, overwrite: bool, *sources: str | None) -> None:
    """Raise a Failure if a folder can't, or mustn't, be written: better before the work.

    Args:
        folder: where the command writes to.
        overwrite: may files that are there be replaced?
        sources: the models that are read; none of them is replaced, whatever `overwrite` says.
    """
    if folder.exists() and not folder.is_dir():
        raise Failure(f"--output {folder} is a file: pass a folder")
    for source in sources:
        if source is not None and _same(folder, Path(source).expanduser()):
            raise Failure(f"--output {folder} is {source} itself: pass another folder")
    _check_writable(folder)
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise Failure(f"--output {folder} is not empty: pass another folder, or --overwrite")


def check_output_file(file: Path, overwrite: bool, types: tuple[str, ...]) -> None:
    """Raise a Failure if a file can't, or mustn't, be written.

    Args:
        file: what the command writes.
        overwrite: may one that is there be replaced? One of another type never is.
        types: the endings that such a file has.
    """
    if file.is_dir():
        raise Failure(f"--output {file} is a folder: pass a file")
    _check_writable(file)
    if file.exists() and not overwrite:
        raise Failure(f"--output {file} exists already: pass another name, or --overwrite")
    if file.exists() and file.suffix.lower() not in types:
        raise Failure(f"--output {file} exists and is no {types[0]} file: pass another name")


def _same(folder: Path, source: Path) -> bool:
    return folder.exists() and source.exists() and folder.samefile(source)


def _check_writable(path: Path) -> None:
    parent = next(p for p in path.absolute().parents if p.exists())
    places = [path] if path.is_dir() else [parent, path] if path.exists() else [parent]
    for place in places:
        if not os.access(place, os.W_OK) or (place is parent and not parent.is_dir()):
            raise Failure(f"--output {path}: nothing can be written in {place}")
