"""Which run a folder holds, and which blocks it has finished: what a run goes on from, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from ...checkpoint.headers import read_layers
from ...core.errors import CheckpointError, ConfigError
from ...core.json_records import read_json, read_record
from ...pruning.report import LayerReport
from .source import file_digest

VERSION = 1
MANIFEST = "manifest.json"
BLOCKS, OUTPUTS = "blocks", "outputs"


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


def check_same(before: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
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


def check_files(found: Manifest, folder: Path) -> None:
    """Raise a CheckpointError unless all that a manifest names is there and intact."""
    expected = {Path(BLOCKS, entry.file): entry.digest for entry in found.blocks}
    expected |= {Path(OUTPUTS, name): digest for name, digest in found.outputs.items()}
    for path, digest in expected.items():
        if (folder / path).is_symlink() or not (folder / path).is_file():
            raise CheckpointError(f"{folder / path}: it is missing, or no file of its own")
        try:
            same = file_digest(folder / path) == digest
        except OSError as error:
            raise CheckpointError(f"{folder / path}: it can't be read: {error}") from None
        if not same:
            raise CheckpointError(
                f"{folder / path}: it is damaged: remove the run with "
                f"hf_sparse.clear_checkpoint({str(folder)!r}) and begin anew"
            )
    for entry in found.blocks:
        _check_block(folder / BLOCKS / entry.file, entry)


def _check_block(path: Path, entry: Entry) -> None:
    """Raise a CheckpointError unless a file holds the block that its entry says."""
    with safe_open(path, framework="pt") as file:
        foreign = [key for key in file.keys() if not key.startswith(f"{entry.name}.")]  # noqa: SIM118
    held, said = set(read_layers([path])), {layer.name for layer in entry.layers}
    if foreign or held != said:
        names = ", ".join([*foreign, *sorted(held ^ said)][:3])
        raise CheckpointError(
            f"{path}: it doesn't hold what the manifest says of {entry.name}: {names}"
        )
