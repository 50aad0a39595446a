"""Shards that belong together: a save has an id, in every shard, in their index and in config.json.

It is a digest of what is saved, so that equal models stay equal files. One file needs none: with
config.json it is put in place at once, see `commit`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.sparse_config import QUANT_METHOD, SAVE_KEY
from ..core.errors import CheckpointError
from ..core.json_records import read_json
from .commit import INDEX
from .staging import CONFIG_FILE

_BLOCK = 1 << 23
# Digits of the id: 128 bits.
_DIGITS = 32


def sort_metadata(path: str | os.PathLike[str]) -> None:
    """Put a safetensors file's metadata in the order of their keys, in place.

    The library writes them in the order of a hash table that is seeded anew in every process;
    equal models should be equal files. Their order has no meaning and their length stays.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        text = _with_metadata(file.read(size), {})
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def mark_shards(folder: Path) -> None:
    """Write the id of a complete save into its shards, their index and config.json.

    Only if config.json is a sparse model's: no other reader asks for it.
    """
    config = _read_object(folder / CONFIG_FILE)
    index = _read_object(folder / INDEX)
    settings = config.get("quantization_config")
    if not index or not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
        return
    shards = sorted(set(index["weight_map"].values()))
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    for name in shards:
        with open(folder / name, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    save_id = digest.hexdigest()[:_DIGITS]
    for name in shards:
        _mark(folder / name, save_id)
    settings[SAVE_KEY] = index["metadata"][SAVE_KEY] = save_id
    for path, content in ((folder / CONFIG_FILE, config), (folder / INDEX, index)):
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_one_save(found: Mapping[str, str | None]) -> None:
    """Raise a CheckpointError if files are parts of several saves.

    Args:
        found: the id that each file's metadata hold, by path; None without one.
    """
    folder = Path(next(iter(found))).parent
    ids = dict(found)
    if all(Path(path).name.startswith(("model-", "model.safetensors")) for path in found):
        settings = _read_object(folder / CONFIG_FILE).get("quantization_config")
        about = _read_object(folder / INDEX).get("metadata") if len(found) > 1 else None
        for name, content in ((CONFIG_FILE, settings), (INDEX, about)):
            # Who writes config.json anew, for a setting of his own, leaves the id out.
            if isinstance(content, dict) and SAVE_KEY in content:
                ids[str(folder / name)] = str(content[SAVE_KEY])
    first, *others = ids.items()
    for path, save_id in others:
        if save_id != first[1]:
            raise CheckpointError(
                f"{path}: it is of {_named(save_id)}, {Path(first[0]).name} beside it of "
                f"{_named(first[1])}: save the model there again, or copy all files of one save"
            )


def _named(save_id: str | None) -> str:
    return f"save {save_id[:_DIGITS]!r}" if save_id else "a save without an id"


def _mark(path: Path, save_id: str) -> None:
    """Add the id to a file's metadata, which moves its tensors."""
    marked = path.with_name(f"marked.{path.name}")
    with open(path, "rb") as old, open(marked, "wb") as new:
        text = _with_metadata(old.read(int.from_bytes(old.read(8), "little")), {SAVE_KEY: save_id})
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, _BLOCK)
    os.replace(marked, path)


def _with_metadata(header: bytes, more: Mapping[str, str]) -> bytes:
    """A safetensors header with sorted metadata, and some more."""
    content = json.loads(header)
    metadata = content.pop("__metadata__", {}) | more
    content = {"__metadata__": dict(sorted(metadata.items())), **content}
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; {} if there is none to be read."""
    try:
        content = read_json(path)
    except (OSError, CheckpointError):
        return {}
    return content if isinstance(content, dict) else {}
