"""Which files a checkpoint in a folder consists of, as transformers finds them; no torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError
from ..core.json_records import read_json

CONFIG_FILE = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The key of config.json in which transformers looks for the name of the weights' file.
POINTER = "transformers_weights"
# What a sparse checkpoint says there: the name of no file. A transformers that knows nothing of
# hf_sparse stops at it, whatever it is told to ignore; otherwise it would leave the layers random.
GUARD = "import-hf_sparse-first.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's checkpoint; none if it has no weights.

    They are what config.json leads to, if it does, or else the single file, or those that the index
    names. Files of variants, adapters and other saves in the folder are no part of it.

    Raises:
        CheckpointError: an index can't be read, or names what is no file of the folder.
    """
    named = pointer(folder)
    found = folder / (named or SINGLE)
    if not named and not found.is_file():
        found = folder / INDEX
        if not found.is_file():
            return []
    if found.suffix != ".json":
        return [_inside(folder, named or SINGLE, folder / CONFIG_FILE)]
    names = _indexed(found)
    return [_inside(folder, name, found) for name in sorted(set(names))]


def saved_in(folder: Path) -> Path:
    """Where a checkpoint's files are: its folder, or one in it that a save has left by dying."""
    files = weight_files(folder) if pointer(folder) else []
    return files[0].parent if files else folder


def pointer(folder: Path) -> str | None:
    """The file in which config.json says that the weights are, relative to the folder; None if it
    doesn't say, or only keeps others away."""
    named = read_object(folder / CONFIG_FILE).get(POINTER)
    return named if isinstance(named, str) and named != GUARD else None


def check_distinct(files: Mapping[str, Iterable[str]]) -> None:
    """Raise a CheckpointError if a tensor is in two files; `files` has the names in each."""
    seen: dict[str, str] = {}
    for path, names in files.items():
        for name in names:
            if name in seen:
                raise CheckpointError(f"{path}: {name} is in {seen[name]}, too")
            seen[name] = path


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; {} if there is none to be read."""
    try:
        content = read_json(path, any_number=True)  # a config may hold an infinity
    except (OSError, CheckpointError):
        return {}
    return content if isinstance(content, dict) else {}


def _indexed(index: Path) -> list[Any]:
    try:
        names = list(read_json(index)["weight_map"].values())
        if not names:
            raise CheckpointError("it names no file")
    except (CheckpointError, OSError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: it can't be read: {error!r}") from None
    for name in names:
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: it can't be read: it names {name!r}, which is no file")
    return names


def _inside(folder: Path, name: str, where: Path) -> Path:
    path = folder / name
    plain = not Path(name).is_absolute() and ".." not in Path(name).parts
    if not plain or path.suffix != ".safetensors" or not path.is_file():
        raise CheckpointError(
            f"{where}: it can't be read: it names {name!r}, which is no safetensors file of "
            f"{str(folder)!r}"
        )
    return path
