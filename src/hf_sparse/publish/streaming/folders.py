"""The folders of a run: apart from each other, and where finished blocks and activations go."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

from ...core.errors import ConfigError, SaveError
from ...core.processes import Processes
from .estimate import Estimate
from .ledger import WAITING
from .manifest import BLOCKS, OUTPUTS


def as_folder(argument: str, value: object) -> Path:
    """The folder that an argument names.

    Raises:
        ConfigError: it is no path.
        SaveError: a file is there.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(
            f"{argument}={value!r} is no folder: pass a path, '.' for the current one"
        )
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"{argument} {text!r} is a file: pass a folder")
    return folder


def check_apart(model: Path, target: Path, checkpoint_dir: Path | None) -> None:
    """Raise a ConfigError if one of a run's folders is another one, or in it.

    The dense weights would be replaced, or go with the sparse ones wherever those are copied; and a
    folder that finished blocks are in is no empty place for a result.
    """
    folders = {"the model's folder": model, "output_dir": target}
    if checkpoint_dir is not None:
        folders["checkpoint_dir"] = checkpoint_dir
    for (name, folder), (other, outer) in permutations(reversed(folders.items()), 2):
        place, around = folder.resolve(), outer.resolve()
        if around in (place, *place.parents):
            where = "the same folder as" if place == around else "in"
            raise ConfigError(
                f"{name} {str(folder)!r} is {where} {other} {str(outer)!r}: what is read, what is "
                "kept and the result need folders that are not in each other"
            )


def check_room(needed: Estimate, spill: bool, target: Path, checkpoint_dir: Path | None) -> None:
    """Raise an error unless a run can write what it will write, where it will.

    What a run before has left in checkpoint_dir takes no more.

    Raises:
        ConfigError: a disk has no room for it.
        SaveError: nothing can be written there.
    """
    kept = checkpoint_dir or _beside(target)
    left = [path for part in (BLOCKS, OUTPUTS) for path in (kept / part).glob("*.safetensors")]
    there = sum(path.stat().st_size for path in left) if checkpoint_dir is not None else 0
    waiting = needed.memory["activations"] if spill else 0
    wanted: dict[int, int] = {}
    for path, size in (target, needed.result), (kept, max(needed.kept - there, 0) + waiting):
        place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        if not os.access(place, os.W_OK):
            raise SaveError(f"nothing can be written in {str(place)!r}: pass another folder")
        disk = place.stat().st_dev
        wanted[disk] = wanted.get(disk, 0) + size
        free = shutil.disk_usage(place).free
        if wanted[disk] > free:
            raise ConfigError(
                f"the run takes {wanted[disk] / 1e9:.1f} GB of disk, for finished blocks and the "
                f"result, and {free / 1e9:.1f} GB are free at {str(place)!r}"
            )


@contextmanager
def folder_for(target: Path, checkpoint_dir: Path | None, processes: Processes) -> Iterator[Path]:
    """Where finished blocks go; by default to a hidden folder that goes at the end."""
    if checkpoint_dir is not None:
        yield checkpoint_dir
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = None
    try:
        if processes.is_first:
            folder = tempfile.mkdtemp(dir=_beside(target), prefix=".hf_sparse-run-")
        yield Path(processes.from_first(lambda: folder))  # type: ignore[arg-type]
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _beside(target: Path) -> Path:
    """On the disk of the output, which may be a mount point in a folder that can't be written."""
    return target if target.is_dir() else target.parent


@contextmanager
def waiting_folder(kept: Path, spill: bool) -> Iterator[Path | None]:
    """The folder for activations that wait in files, if they do."""
    if not spill:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=kept, prefix=WAITING) as folder:
        yield Path(folder)
