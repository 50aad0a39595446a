"""Where a save is written before it counts: a hidden folder in the target, held while it is used.

It lies inside the target, not beside it: that is on the same file system even if the target is a
mount point or a link, and needs no right to write anywhere else.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .weight_files import pointer

if sys.platform != "win32":
    import fcntl

_PREFIX = ".hf_sparse-save-"
_ATTEMPTS = 20
_NAME = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A new folder in a hidden folder of `target`, which is created if it isn't there.

    The hidden folder is locked for as long as its process lives. In the end it is removed, with
    those that dead processes left, but for the one that config.json names as the place of the
    weights; so is `target`, if it was created and stayed empty.
    """
    missing = [path for path in (target, *target.parents) if not path.exists()]
    try:
        hidden, held = _hidden_folder(target)
        try:
            staging = hidden / "files"
            staging.mkdir()
            yield staging
        finally:
            with locked(target):
                if hidden.name != _named_by_config(target):
                    shutil.rmtree(hidden, ignore_errors=True)
                if held is not None:
                    os.close(held)
                _remove_dead(target)
    finally:
        for path in missing:
            _remove_empty(path)


def _hidden_folder(target: Path) -> tuple[Path, int | None]:
    """A new hidden folder in the target, which is created, and its lock."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            target.mkdir(parents=True, exist_ok=True)
            with locked(target):
                _remove_dead(target)
                hidden = Path(tempfile.mkdtemp(dir=target, prefix=_PREFIX))
                return hidden, lock(hidden)
        except (FileNotFoundError, FileExistsError):
            # Another process, which saves nothing, has removed the folder that it had created.
            if not left:
                raise
    raise AssertionError


def _remove_empty(folder: Path) -> None:
    try:
        with locked(folder):  # nobody is about to write there
            if not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        # Another process has removed it, or made something in it since.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST):
            raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time. File systems that have no locks go without."""
    held = lock(folder, wait=True)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def new_file(path: Path) -> Path:
    """A new, empty file beside `path`, with the mode that the umask gives and no name to guess."""
    staging = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    os.close(os.open(staging, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return staging


def settle(staging: Path) -> None:
    """Give all in a staging folder the modes that the umask gives, and bring it to the disk.

    safetensors' files are the owner's alone otherwise, whatever the umask says.
    """
    mode = staging.stat().st_mode & 0o777
    staging.parent.chmod(mode)
    for path in sorted(staging.rglob("*"), reverse=True):
        path.chmod(mode if path.is_dir() else mode & 0o666)
        sync(path)
    sync(staging)
    sync(staging.parent)


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of files, to the disk."""
    if path.is_dir() and sys.platform == "win32":
        return  # folders can't be opened there
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def lock(folder: Path, wait: bool = False) -> int | None:
    """Hold a folder until what is returned is closed; None if it is held, or can't be.

    Raises:
        FileNotFoundError: it isn't there, or was removed while it was waited for.
    """
    if sys.platform == "win32":
        return None
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        return None
    try:
        here = os.path.samestat(os.fstat(opened), os.stat(folder))
    except FileNotFoundError:
        here = False
    if not here:
        os.close(opened)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    return opened


def _remove_dead(target: Path) -> None:
    """Remove the hidden folders that no process holds and config.json doesn't name."""
    named = _named_by_config(target)
    for path in target.iterdir():
        ours = _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        if ours and path.name != named and (held := lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(held)


def _named_by_config(target: Path) -> str | None:
    """The hidden folder in which config.json says that the weights are."""
    named = pointer(target)
    return named.partition("/")[0] if named else None
