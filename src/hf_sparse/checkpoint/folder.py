"""Folders and files of a checkpoint, which appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..core.errors import SaveError
from .commit import put_in_place
from .save_id import mark_save, sort_metadata
from .staging import new_file, settle, staging_folder, sync


def write_folder(
    save_directory: str | os.PathLike[str],
    save: Callable[[str], Any],
    keep: Callable[[Path], bool] = lambda path: False,
) -> None:
    """Run `save` on a hidden folder in the target, then put its files in their places.

    A full disk can only strike before the target's own files are touched. Whenever the process
    dies, the target is loaded as the old checkpoint or as the new one, see `commit`.

    Args:
        save_directory: folder; created if it isn't there.
        save: writes everything into the folder it is given; may itself use `write_folder`.
        keep: is told of each file of the target that the new ones have, too; True leaves it as it
            is. Default: all are replaced.

    Raises:
        SaveError: the path is a file, or writing failed; says what is there now.
    """
    if not os.fspath(save_directory):
        raise SaveError("can't save to a folder without a name: pass '.' for the current one")
    target = Path(save_directory)
    try:
        if target.exists() and not target.is_dir():
            raise SaveError(f"can't save to {str(target)!r}: it is a file, pass a folder")
        with staging_folder(target) as staging:
            _fill(staging, save, target)
            put_in_place(staging, target, keep)
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(f"can't save to {str(target)!r}: {error}") from error
    except ValueError as error:
        if "\0" not in str(target):
            raise
        raise SaveError(f"can't save to {str(target)!r}: {error}") from error


def _fill(staging: Path, save: Callable[[str], Any], target: Path) -> None:
    """Everything that takes room; the target is untouched."""
    try:
        save(str(staging))
        for path in staging.glob("*.safetensors"):
            sort_metadata(path)
        mark_save(staging)
        settle(staging)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "No space" not in str(error):
            raise
        inner = error.__cause__ if isinstance(error, SaveError) else None
        raise SaveError(
            f"saving to {str(target)!r} failed, nothing was changed there: {inner or error}"
        ) from (inner or error)


def write_file(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file that appears complete or not at all.

    Raises:
        SaveError: it could not be written; what was there before is as it was.
    """
    target = Path(path)
    staging = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = new_file(target)
        staging.write_text(text, encoding="utf-8")
        sync(staging)
        os.replace(staging, target)
    except OSError as error:
        raise SaveError(f"{str(target)!r} could not be written: {error}") from error
    finally:
        if staging is not None:
            staging.unlink(missing_ok=True)
