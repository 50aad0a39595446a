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
import shutil
from collections.abc import Collection, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...calibration.activations import Activations
from ...checkpoint.staging import lock, new_file, sync
from ...core.errors import CheckpointError, ConfigError, SaveError
from ...core.json_records import read_json, read_record
from ...pruning.report import LayerReport
from ...pruning.residence import FinishedBlock
from .source import file_digest

VERSION = 1
MANIFEST = "manifest.json"
BLOCKS, OUTPUTS = "blocks", "outputs"
# How the names of folders begin in which activations wait.
WAITING = "waiting-"


@dataclass(frozen=True)
class Entry:
    """A finished block as the manifest has it: its file in `blocks`, and that file's SHA-256."""

    name: str
    file: str
    digest: str
    seconds: float
    layers: tuple[LayerReport, ...]


@dataclass(frozen=True)
class Manifest:
    """Of a run.

    Attributes:
        version: of this format.
        run: what the result depends on: names and values as text.
        blocks: those that are finished, in order.
        outputs: SHA-256 of the files in `outputs`, by their names.
        standing: the digest of what each pass handed to the block after the last one.
    """

    version: int
    run: Mapping[str, str]
    blocks: tuple[Entry, ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)
    standing: Mapping[str, str] = field(default_factory=dict)


class Ledger:
    """Holds its folder until it is closed, or its process ends.

    Args:
        folder: created if it isn't there.
        run: what the result depends on beside the config: names and values as text.
        resumable: keep what a later run needs to go on.

    Raises:
        SaveError: the folder can't be used, or another run is at work in it.
    """

    def __init__(self, folder: Path, run: Mapping[str, str], resumable: bool) -> None:
        self._folder, self._resumable = folder, resumable
        self._run = dict(run)
        self._manifest = Manifest(VERSION, self._run)
        try:
            for path in (folder, folder / BLOCKS, folder / OUTPUTS):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(f"can't keep a run in {str(folder)!r}: {error}") from error
        self._held: int | None = None
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
        found = read_manifest(self._folder)
        if found is not None:
            _check_same(found.run, self._run, self._folder)
            _check_files(found, self._folder)
        self._manifest = found or Manifest(VERSION, self._run)
        named = {entry.file for entry in self._manifest.blocks} | set(self._manifest.outputs)
        self._remove_all_but(named)
        return {e.name: FinishedBlock(e.layers, e.seconds) for e in self._manifest.blocks}

    def activations(self, waiting: Path | None) -> Activations:
        """Where passes wait, and what was kept of them."""
        kept = self._folder / OUTPUTS if self._resumable else None
        self._activations = Activations(waiting, kept, self._stand_ins(), self._manifest.standing)
        return self._activations

    @property
    def files(self) -> list[Path]:
        """Of the finished blocks."""
        return [self._folder / BLOCKS / entry.file for entry in self._manifest.blocks]

    def finish(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        done: FinishedBlock,
    ) -> None:
        """Write a block, and what the next one needs: once this returns, it is on the disk.

        Raises:
            SaveError: there is no room, or the like; the blocks before are as they were.
        """
        place = self._folder / BLOCKS / f"{len(self._manifest.blocks):05}.safetensors"
        try:
            written = new_file(place)
            save_file(dict(tensors), written, dict(metadata))
            _settle(written, place)
            kept = {}
            for path in sorted((self._folder / OUTPUTS).iterdir()):
                sync(path)
                kept[path.name] = self._manifest.outputs.get(path.name) or file_digest(path)
            digest = file_digest(place) if self._resumable else ""
            entry = Entry(name, place.name, digest, done.seconds, done.layers)
            blocks = (*self._manifest.blocks, entry)
            self._manifest = Manifest(VERSION, self._run, blocks)
            needed = {path.name for path in self._activations.needed(self._stand_ins())}
            outputs = {name: digest for name, digest in kept.items() if name in needed}
            standing = self._activations.standing
            self._manifest = Manifest(VERSION, self._run, blocks, outputs, dict(standing))
            self._write_manifest()
            for name in kept.keys() - needed:
                (self._folder / OUTPUTS / name).unlink()
        except (OSError, SafetensorError) as error:
            again = "run it again to go on from there" if self._resumable else "nothing is kept"
            raise SaveError(
                f"{name} is pruned but can't be written to {str(self._folder)!r}: {error}; the "
                f"blocks before it are there: {again}"
            ) from error

    def _remove_waiting(self) -> None:
        for path in self._folder.glob(f"{WAITING}*"):
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Let other runs use the folder."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def clear(self) -> None:
        """Remove the run; the folder too, if nothing else is in it."""
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
                if ".safetensors" in path.name and path.name not in named:
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
        written = new_file(place)
        written.write_text(json.dumps(asdict(self._manifest), indent=1), encoding="utf-8")
        _settle(written, place)
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


def read_manifest(folder: Path) -> Manifest | None:
    """A folder's manifest; None if it has none.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise CheckpointError(f"{path}: it is not of version {VERSION}, which this hf_sparse reads")
    found: Manifest = read_record(Manifest, content, str(path))
    for name in [entry.file for entry in found.blocks] + list(found.outputs):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: it names {name!r}, which is no file of a run")
    return found


def _check_same(before: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
    """Raise a ConfigError that says what has changed since a run began."""
    other = [key for key in (*now, *before) if before.get(key) != now.get(key)]
    if other:
        changes = "; ".join(
            f"{key} was {before.get(key, 'not given'):.80}, is {now.get(key, 'not given'):.80}"
            for key in dict.fromkeys(other)
        )
        raise ConfigError(
            f"the run in {str(folder)!r} can't go on, since its result would be neither's: "
            f"{changes}. Pass what it began with, another checkpoint_dir, or remove it with "
            f"hf_sparse.clear_checkpoint({str(folder)!r})"
        )


def _check_files(found: Manifest, folder: Path) -> None:
    """Raise a CheckpointError unless all that a manifest names is there and intact."""
    expected = {Path(BLOCKS, entry.file): entry.digest for entry in found.blocks}
    expected |= {Path(OUTPUTS, name): digest for name, digest in found.outputs.items()}
    for path, digest in expected.items():
        try:
            same = file_digest(folder / path) == digest
        except OSError as error:
            raise CheckpointError(f"{folder / path}: it can't be read: {error}") from None
        if not same:
            raise CheckpointError(
                f"{folder / path}: it is damaged: remove the run with "
                f"hf_sparse.clear_checkpoint({str(folder)!r}) and begin anew"
            )


def _list_of(name: str) -> str:
    """The list that a block is an element of, or its own name."""
    head, _, last = name.rpartition(".")
    return head if last.isdigit() else name


def _settle(written: Path, place: Path) -> None:
    """Bring a file to the disk and to its place."""
    try:
        sync(written)
        os.replace(written, place)
    finally:
        written.unlink(missing_ok=True)
