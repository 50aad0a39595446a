"""The folders of a run: apart from each other, and where finished blocks and activations go."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

from ...core.errors import ConfigError
from ...core.processes import Processes
from .estimate import Estimate
from .ledger import WAITING
from .manifest import BLOCKS, OUTPUTS


def check_apart(model: Path, target: Path, checkpoint_dir: str | os.PathLike[str] | None) -> None:
    """Raise a ConfigError if one of a run's folders is another one, or in it.

    The dense weights would be replaced, or go with the sparse ones wherever those are copied; and a
    folder that finished blocks are in is no empty place for a result.
    """
    folders = {"the model's folder": model, "output_dir": target}
    if checkpoint_dir is not None:
        folders["checkpoint_dir"] = Path(checkpoint_dir)
    for (name, folder), (other, outer) in permutations(reversed(folders.items()), 2):
        place, around = folder.resolve(), outer.resolve()
        if around in (place, *place.parents):
            where = "the same folder as" if place == around else "in"
            raise ConfigError(
                f"{name} {str(folder)!r} is {where} {other} {str(outer)!r}: what is read, what is "
                "kept and the result need folders that are not in each other"
            )


def check_room(
    needed: Estimate, spill: bool, target: Path, checkpoint_dir: str | os.PathLike[str] | None
) -> None:
    """Raise a ConfigError if a disk has no room for what a run will write there.

    What a run before has left in checkpoint_dir takes no more.
    """
    kept = target.parent if checkpoint_dir is None else Path(checkpoint_dir)
    left = [path for part in (BLOCKS, OUTPUTS) for path in (kept / part).glob("*.safetensors")]
    there = sum(path.stat().st_size for path in left) if checkpoint_dir is not None else 0
    waiting = needed.memory["activations"] if spill else 0
    wanted: dict[int, int] = {}
    for path, size in (target, needed.result), (kept, max(needed.kept - there, 0) + waiting):
        place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        disk = place.stat().st_dev
        wanted[disk] = wanted.get(disk, 0) + size
        free = shutil.disk_usage(place).free
        if wanted[disk] > free:
            raise ConfigError(
                f"the run takes {wanted[disk] / 1e9:.1f} GB of disk, for finished blocks and the "
                f"result, and {free / 1e9:.1f} GB are free at {str(place)!r}"
            )


@contextmanager
def folder_for(
    target: Path, checkpoint_dir: str | os.PathLike[str] | None, processes: Processes
) -> Iterator[Path]:
    """Where finished blocks go: a folder beside the output that goes at the end, by default."""
    if checkpoint_dir is not None:
        yield Path(checkpoint_dir)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = None
    try:
        if processes.is_first:
            folder = tempfile.mkdtemp(dir=target.parent, prefix=".hf_sparse-run-")
        yield Path(processes.from_first(lambda: folder))  # type: ignore[arg-type]
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def waiting_folder(kept: Path, spill: bool) -> Iterator[Path | None]:
    """The folder for activations that wait in files, if they do."""
    if not spill:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=kept, prefix=WAITING) as folder:
        yield Path(folder)
