"""Folders and files of a checkpoint, which appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..core.errors import SaveError
from .headers import sort_metadata

# What a sparse checkpoint has beside its weights: what pruning did, what was measured of it since,
# and both as a page to read.
REPORT_FILE = "pruning_report.json"
EVALUATION_FILE = "pruning_evaluation.json"
PAGE_FILE = "pruning_report.html"
_OWN = ("model*.safetensors", "model*.safetensors.index.json", REPORT_FILE, EVALUATION_FILE)


def write_folder(
    save_directory: str | os.PathLike[str],
    save: Callable[[str], Any],
    keep: Callable[[Path], bool] = lambda path: False,
) -> None:
    """Run `save` on a folder beside the target, then move its files over with renames alone.

    Renaming needs no space, so a full disk can only strike before the target is touched. The
    weights go before the index that names them: a reader never finds an index without its files.

    Args:
        save_directory: folder; created if it isn't there.
        save: writes everything into the folder it is given; may itself use `write_folder`.
        keep: is told of each file of the target that the new ones have, too; True leaves it as it
            is. Default: all are replaced.

    Raises:
        SaveError: the path is a file, or writing failed; what was there before is as it was.
    """
    target = Path(save_directory)
    if target.is_file():
        raise SaveError(f"can't save to {str(target)!r}: it is a file, pass a folder")
    missing = [p for p in (target, *target.parents) if not p.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise SaveError(f"can't save to {str(target)!r}: {error}") from error
    try:
        save(str(staging))
        for path in staging.glob("*.safetensors"):
            sort_metadata(path)
        target.mkdir(exist_ok=True)
        _move(staging, target, keep)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        for created in missing:
            if created.is_dir() and not any(created.iterdir()):
                created.rmdir()
        if isinstance(error, RuntimeError) and "No space" not in str(error):
            raise
        reason = error.__cause__ if isinstance(error, SaveError) else error
        raise SaveError(
            f"saving to {str(target)!r} failed, nothing was changed there: {reason}"
        ) from reason
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_file(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file that appears complete or not at all.

    Raises:
        SaveError: it could not be written; what was there before is as it was.
    """
    target = Path(path)
    staging = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, target)
    except OSError as error:
        raise SaveError(f"{str(target)!r} could not be written: {error}") from error
    finally:
        staging.unlink(missing_ok=True)


def _move(staging: Path, target: Path, keep: Callable[[Path], bool]) -> None:
    new = sorted(p.relative_to(staging) for p in staging.rglob("*") if p.is_file())
    new = [path for path in new if not ((target / path).is_file() and keep(target / path))]
    held = [path.name for path in target.iterdir()]
    stale = stale_files([path.as_posix() for path in new], held)
    for path in sorted(new, key=lambda p: p.suffix == ".json"):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / path, target / path)
    for name in stale:
        (target / name).unlink()


def stale_files(new: Collection[str], held: Collection[str]) -> list[str]:
    """What an earlier checkpoint left that would be taken for a part of the new one.

    Args:
        new: names of the files that are written; if none is a checkpoint's, nothing is stale.
        held: names of the files that are there.
    """
    if not any(_is_own(name) for name in new):
        return []
    return [name for name in held if _is_own(name) and name not in new]


def _is_own(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _OWN)
