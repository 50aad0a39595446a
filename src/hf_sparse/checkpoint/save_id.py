"""Files that belong together: a save has an id, in config.json, and in its shards and their index.

It is a digest of what is saved, so that equal models stay equal files. A checkpoint of one file has
its id in config.json alone, where it is a digest that can be taken of the file again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config.keys import QUANT_METHOD, SAVE_KEY
from ..core.errors import CheckpointError
from .header import read_header
from .weight_files import (
    CONFIG_FILE,
    GUARD,
    INDEX,
    POINTER,
    SINGLE,
    read_object,
    weight_files,
)

_BLOCK = 1 << 23
# Bytes that the id of a single file has of each tensor: training changes them all, and reading a
# whole file would make loading it slow.
_SAMPLE = 4096
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


def mark_save(folder: Path) -> None:
    """Write the id of a complete save into its config.json, its shards and their index.

    And, if there are packed layers, the guard against readers that know none. Only if config.json
    is a sparse model's: no other reader asks for them.
    """
    config, index = read_object(folder / CONFIG_FILE), read_object(folder / INDEX)
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
        return
    if index:
        settings[SAVE_KEY] = index["metadata"][SAVE_KEY] = _mark_shards(folder, index)
        _write_json(folder / INDEX, index)
    elif (folder / SINGLE).is_file():
        settings[SAVE_KEY] = id_of_file(folder / SINGLE)
    guard = {POINTER: GUARD} if _packs(folder) else {}
    _write_json(folder / CONFIG_FILE, config | guard)


def _packs(folder: Path) -> bool:
    """Does a save have packed layers? Without any, every reader may have its dense ones."""
    return any(read_header(path).layers() for path in weight_files(folder)[:1])


def id_of_file(path: str | os.PathLike[str]) -> str:
    """The id of a checkpoint of one safetensors file: a digest of its header, and of the middle of
    each tensor."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
        digest = hashlib.sha256(header)
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for begin, end in sorted(tensor["data_offsets"] for tensor in tensors.values()):
            file.seek(8 + size + max(begin, (begin + end - _SAMPLE) // 2))
            digest.update(file.read(min(_SAMPLE, end - begin)))
    return digest.hexdigest()[:_DIGITS]


def check_one_save(found: Mapping[str, str | None]) -> None:
    """Raise a CheckpointError if a checkpoint's files are parts of several saves, by their ids.

    Args:
        found: the id that each weight file's metadata hold, by path; None without one. All lie in
            one folder, in which config.json and an index are looked for.
    """
    names = {Path(path).name for path in found}
    if names and names != {SINGLE} and all(name.startswith("model-") for name in names):
        folder = Path(next(iter(found))).parent
        check_ids(found, read_object(folder / CONFIG_FILE), read_object(folder / INDEX))
    elif found:  # of a variant, or of a name of the user's: config.json may be another save's
        check_ids(found, {}, {})


def check_single(files: Iterable[str | os.PathLike[str]]) -> None:
    """Raise a CheckpointError if a checkpoint's only file is not what config.json was saved with.

    Its contents have been checked before: what is damaged has an error of its own.
    """
    for path in map(Path, files):
        if path.name == SINGLE:
            config = read_object(path.parent / CONFIG_FILE)
            if SAVE_KEY in _settings(config):
                check_ids({str(path): id_of_file(path)}, config, {})


def check_ids(ids: Mapping[str, str | None], config: Any, index: Any) -> None:
    """Raise a CheckpointError unless weight files, config.json and index have one id.

    Who writes config.json anew, for a setting of his own, leaves the id out: then it says nothing.

    Args:
        ids: those of the weight files, by path.
        config, index: the content of these files; {} if there is none.
    """
    folder, ids = Path(next(iter(ids))).parent, dict(ids)
    about = index.get("metadata")
    for name, content in ((CONFIG_FILE, _settings(config)), (INDEX, about)):
        if isinstance(content, dict) and SAVE_KEY in content:
            ids[str(folder / name)] = str(content[SAVE_KEY])
    first, *others = ids.items()
    for path, save_id in others:
        if save_id != first[1]:
            raise CheckpointError(
                f"{path}: it is of {_named(save_id)}, {Path(first[0]).name} beside it of "
                f"{_named(first[1])}: save the model there again, or copy all files of one save "
                f"(or, if a file was changed on purpose, delete {SAVE_KEY} in {CONFIG_FILE})"
            )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = config.get("quantization_config")
    return settings if isinstance(settings, dict) else {}


def _named(save_id: str | None) -> str:
    return f"save {save_id[:_DIGITS]!r}" if save_id else "a save without an id"


def _mark_shards(folder: Path, index: Mapping[str, Any]) -> str:
    """Write the id into the shards; gives it."""
    shards = sorted(set(index["weight_map"].values()))
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    for name in shards:
        with open(folder / name, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    save_id = digest.hexdigest()[:_DIGITS]
    for name in shards:
        _mark(folder / name, save_id)
    return save_id


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


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
