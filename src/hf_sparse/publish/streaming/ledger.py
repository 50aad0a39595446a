"""What a run from disk to disk has finished, in a folder: enough to go on after any death.

    manifest.json            what is pruned with what, and which blocks are finished
    blocks/                  a safetensors file for each of those
    outputs/                 what the last of them made of each batch

A file is written aside, brought to the disk and renamed; it counts once the manifest, which is
replaced likewise, names it with its digest. What the manifest doesn't name is of a block that was
under way, and goes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...calibration.activations import Activations
from ...checkpoint.staging import lock, new_file, sync
from ...core.errors import SaveError
from ...core.processes import ALONE, Processes
from ...pruning.residence import FinishedBlock
from .manifest import (
    BLOCKS,
    MANIFEST,
    OUTPUTS,
    VERSION,
    Entry,
    Manifest,
    check_files,
    check_same,
    read_manifest,
)
from .source import file_digest

# How the names of folders begin in which activations wait.
WAITING = "waiting-"
# What a run calls its files and folders: no others are removed.
_FILES = re.compile(r"\.?\d{5}\.safetensors(-[0-9a-f]{16})?|.+@\d+( dense)?\.safetensors")
_WAITING = re.compile(rf"{WAITING}[a-z0-9_]{{8}}")


@dataclass(frozen=True)
class PackedBlock:
    """A block to be written: its tensors and their file's metadata, and what is reported of it."""

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    done: FinishedBlock


class Ledger:
    """Holds its folder until it is closed, or its process ends.

    Args:
        folder: created if it isn't there.
        run: what the result depends on beside the config: names and values as text.
        resumable: keep what a later run needs to go on.
        processes: each has a ledger of one folder, and the first writes it; all of them call all
            that isn't a property.

    Raises:
        SaveError: the folder can't be used, or another run is at work in it.
    """

    def __init__(
        self,
        folder: Path,
        run: Mapping[str, str],
        resumable: bool,
        processes: Processes = ALONE,
    ) -> None:
        self._folder, self._resumable, self._processes = folder, resumable, processes
        self._run = dict(run)
        self._manifest = Manifest(VERSION, self._run)
        self._held: int | None = None
        processes.from_first(self._take)

    def _take(self) -> None:
        """Make the folder this run's."""
        folder = self._folder
        parts = folder / BLOCKS, folder / OUTPUTS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in parts:
                if path.is_symlink():
                    raise SaveError(f"{str(path)!r} is a link, a run makes a folder: remove it")
                if path.is_dir() and any(path.iterdir()) and not (folder / MANIFEST).is_file():
                    raise SaveError(
                        f"{str(path)!r} holds files that are not a run's: pass another folder"
                    )
                path.mkdir(exist_ok=True)
        except OSError as error:
            raise SaveError(f"can't keep a run in {str(folder)!r}: {error}") from error
        if os.name == "posix":
            self._held = lock(folder)
            if self._held is None:
                raise SaveError(
                    f"{str(folder)!r} is in use by another run: wait for it, or pass another folder"
                )
        self._remove_waiting()

    def begin(self, settings: Mapping[str, Any]) -> dict[str, FinishedBlock]:
        """The blocks that a run of the same kind has finished; everything else in the folder that
        is a run's goes.

        Raises:
            ConfigError: the folder has a run that something else was asked of; says what differs.
            CheckpointError: a file is damaged or missing.
        """
        self._run |= {f"config: {k}": json.dumps(v) for k, v in settings.items()}
        self._manifest = self._processes.from_first(self._found)
        return {e.name: FinishedBlock(e.layers, e.seconds) for e in self._manifest.blocks}

    def _found(self) -> Manifest:
        """What a run before has left, or one that begins."""
        found = read_manifest(self._folder)
        if found is not None:
            check_same(found.run, self._run, self._folder)
            check_files(found, self._folder)
        self._manifest = found or Manifest(VERSION, self._run)
        named = {entry.file for entry in self._manifest.blocks} | set(self._manifest.outputs)
        self._remove_all_but(named)
        self._write_manifest()
        return self._manifest

    def activations(self, waiting: Path | None) -> Activations:
        """Where passes wait, and what was kept of them."""
        kept = self._folder / OUTPUTS if self._resumable else None
        self._activations = Activations(
            waiting, kept, self._stand_ins(), self._manifest.standing, self._processes
        )
        return self._activations

    @property
    def files(self) -> list[Path]:
        """Of the finished blocks."""
        return [self._folder / BLOCKS / entry.file for entry in self._manifest.blocks]

    def finish(self, block: PackedBlock) -> None:
        """Write a block, and what the next one needs: once this returns, it is on the disk.

        Raises:
            SaveError: there is no room, or the like; the blocks before are as they were.
        """
        # Behind this all have written their own passes' outputs.
        told = self._processes.gather(self._activations.standing)
        standing = {name: digest for theirs in told for name, digest in theirs.items()}
        write = partial(self._write, block, standing)
        self._manifest = self._processes.from_first(write)

    def _write(self, block: PackedBlock, standing: Mapping[str, str]) -> Manifest:
        place = self._folder / BLOCKS / f"{len(self._manifest.blocks):05}.safetensors"
        try:
            with _written(place) as written:
                save_file(dict(block.tensors), written, dict(block.metadata))
            kept = {}
            for path in sorted((self._folder / OUTPUTS).iterdir()):
                sync(path)
                kept[path.name] = self._manifest.outputs.get(path.name) or file_digest(path)
            digest = file_digest(place) if self._resumable else ""
            entry = Entry(block.name, place.name, digest, block.done.seconds, block.done.layers)
            blocks = (*self._manifest.blocks, entry)
            self._manifest = Manifest(VERSION, self._run, blocks)
            needed = {path.name for path in self._activations.needed(self._stand_ins())}
            outputs = {name: digest for name, digest in kept.items() if name in needed}
            self._manifest = Manifest(VERSION, self._run, blocks, outputs, standing)
            self._write_manifest()
            for file in kept.keys() - needed:
                (self._folder / OUTPUTS / file).unlink()
            return self._manifest
        except (OSError, SafetensorError) as error:
            again = "run it again to go on from there" if self._resumable else "nothing is kept"
            raise SaveError(
                f"{block.name} is pruned but can't be written to {str(self._folder)!r}: {error}; "
                f"the blocks before it are there: {again}"
            ) from error

    def _remove_waiting(self) -> None:
        for path in self._folder.iterdir():
            if _WAITING.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Let other runs use the folder."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def clear(self) -> None:
        """Remove the run; the folder too, if nothing else is in it."""
        self._processes.from_first(self._clear)

    def _clear(self) -> None:
        (self._folder / MANIFEST).unlink(missing_ok=True)
        self._remove_all_but(())
        self._remove_waiting()
        for path in (self._folder / BLOCKS, self._folder / OUTPUTS, self._folder):
            with suppress(OSError):
                path.rmdir()

    def _remove_all_but(self, named: Collection[str]) -> None:
        """Remove what runs have left in the folder, half written or waiting, but for some files."""
        for part in (BLOCKS, OUTPUTS):
            for path in (self._folder / part).iterdir():
                if _FILES.fullmatch(path.name) and path.name not in named:
                    path.unlink()
        for path in self._folder.glob(f".{MANIFEST}-*"):
            path.unlink()

    def _stand_ins(self) -> dict[str, str]:
        """For each finished block the one whose outputs stand for its own: in a list the last."""
        last: dict[str, str] = {}
        for entry in self._manifest.blocks:
            last[_list_of(entry.name)] = entry.name
        return {entry.name: last[_list_of(entry.name)] for entry in self._manifest.blocks}

    def _write_manifest(self) -> None:
        if not self._resumable:
            return
        for part in (BLOCKS, OUTPUTS):
            sync(self._folder / part)
        place = self._folder / MANIFEST
        with _written(place) as written:
            written.write_text(json.dumps(asdict(self._manifest), indent=1), encoding="utf-8")
        sync(self._folder)


def clear_checkpoint(checkpoint_dir: str | os.PathLike[str]) -> None:
    """Remove what a run from disk to disk has kept in a folder; other files stay.

    Args:
        checkpoint_dir: what `prune_checkpoint` was given. Removed, too, if nothing else is in it.

    Raises:
        SaveError: a run is at work in it.
    """
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        return
    with closing(Ledger(folder, {}, resumable=False)) as ledger:
        ledger.clear()


def _list_of(name: str) -> str:
    """The list that a block is an element of, or its own name."""
    head, _, last = name.rpartition(".")
    return head if last.isdigit() else name


@contextmanager
def _written(place: Path) -> Iterator[Path]:
    """A file to write, which then goes to the disk and to its place; none is left of a failure."""
    written = new_file(place)
    try:
        yield written
        sync(written)
        os.replace(written, place)
    finally:
        written.unlink(missing_ok=True)
