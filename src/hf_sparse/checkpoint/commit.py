"""A complete save put in the place of an older one, so that a reader finds one or the other.

Many files can't be renamed at once, but config.json can, and may say where the weights are
(`transformers_weights`, which transformers follows and never writes). So it is replaced twice:

    1. by the new one, which names the weights in the staging folder: from here on the new
       checkpoint is the folder's;
    2. once all files are linked into their places, and those of the old checkpoint that none has
       replaced are removed, by the new one without that name.

A process that dies before 1 leaves the old checkpoint, one that dies later the new one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError, SaveError
from ..core.json_records import read_json
from .staging import locked, sync
from .weight_files import CONFIG_FILE, INDEX, POINTER, SINGLE

# What a sparse checkpoint has beside its weights: what pruning did, what was measured of it since,
# and both as a page to read.
REPORT_FILE = "pruning_report.json"
EVALUATION_FILE = "pruning_evaluation.json"
PAGE_FILE = "pruning_report.html"
# What its attention has learned.
ATTENTION_FILE = "sparse_attention.safetensors"

_SHARD = re.compile(r"model(?:\.(.+))?-\d{5}-of-\d{5}\.safetensors")
_WHOLE = re.compile(r"model(?:\.(.+))?\.safetensors|model\.safetensors\.index(?:\.(.+))?\.json")


def put_in_place(staging: Path, target: Path, keep: Callable[[Path], bool]) -> None:
    """Move what a staging folder holds to its target, and remove what that replaces.

    Args:
        staging: a folder in `target`, complete and on the disk.
        target: the folder.
        keep: is told of each file of the target that the new ones have, too; True leaves it as it
            is.

    Raises:
        SaveError: it failed; says what is in the folder now.
    """
    with locked(target):
        new = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
        new = [path for path in new if not ((target / path).is_file() and keep(target / path))]
        for path in new:
            if obstacle := _obstacle(target, path):
                raise SaveError(
                    f"saving to {str(target)!r} failed, nothing was changed there: {obstacle}: "
                    "remove it, or pass another folder"
                )
        held = [path.name for path in target.iterdir()]
        names = [path.as_posix() for path in new]
        stale = stale_files(names, held, lambda name: target / name)
        replaces = Path(CONFIG_FILE) in new and CONFIG_FILE in held
        pointer = _pointer(staging, names) if replaces else None
        try:
            if pointer:
                _point(staging, target, pointer)
            _move(staging, target, new, stale, leave=bool(pointer))
        except OSError as error:
            state = "complete and loads" if pointer else "not complete"
            raise SaveError(
                f"saving to {str(target)!r} broke off while files were moved there, what it holds "
                f"is {state}; save again: {error}"
            ) from error


def _obstacle(target: Path, path: Path) -> str | None:
    """What keeps a file from its place, if anything does."""
    if (target / path).is_dir():
        return f"{str(path)!r} is a folder there"
    for parent in [target / parent for parent in path.parents][:-1]:
        if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
            return f"{parent.name!r}, in which a file is to go, is a file or link there"
    return None


def stale_files(
    new: Collection[str], held: Collection[str], fetch: Callable[[str], Path]
) -> list[str]:
    """What is left of the checkpoint that a new one replaces: never another file.

    These are the single file, or the index and the shards that it names, of the same variant, and
    the report and evaluation of pruning.

    Args:
        new: names of the files that are written; if none is a model's weights, nothing is stale.
        held: names of the files that are there.
        fetch: gives the path of one that is there; called for an index only.
    """
    stale: set[str] = set()
    for variant in {_variant(name) for name in new if _is_whole(name)}:
        infix = f".{variant}" if variant else ""
        index = f"model.safetensors.index{infix}.json"
        stale |= {f"model{infix}.safetensors", index, REPORT_FILE, EVALUATION_FILE, ATTENTION_FILE}
        if index in held:
            shards = [name for name in _named_files(fetch(index)) if _SHARD.fullmatch(name)]
            stale |= {name for name in shards if _variant(name) == variant}
    return sorted(stale.intersection(held).difference(new))


def _is_whole(name: str) -> bool:
    """Does a file stand for all weights: is it the only one, or the index of several?"""
    return not _SHARD.fullmatch(name) and bool(_WHOLE.fullmatch(name))


def _variant(name: str) -> str | None:
    found = _SHARD.fullmatch(name) or _WHOLE.fullmatch(name)
    return next((group for group in found.groups() if group), None) if found else None


def _named_files(index: Path) -> list[str]:
    try:
        names = read_json(index)["weight_map"].values()
    except (OSError, CheckpointError, TypeError, KeyError, AttributeError):
        return []  # damaged: nothing can be said of its files
    return [name for name in names if isinstance(name, str)]


def _pointer(staging: Path, names: Collection[str]) -> str | None:
    """What `transformers_weights` has to be for a staging folder's weights; None without any.

    Of an index a second one is written, since transformers takes its names from the target on.
    """
    place = f"{staging.parent.name}/{staging.name}"
    if SINGLE in names:
        return f"{place}/{SINGLE}"
    if INDEX not in names:
        return None
    index = json.loads((staging / INDEX).read_text(encoding="utf-8"))
    files = {key: f"{place}/{name}" for key, name in index["weight_map"].items()}
    _write_json(staging.parent / INDEX, index | {"weight_map": files})
    return f"{staging.parent.name}/{INDEX}"


def _point(staging: Path, target: Path, pointer: str) -> None:
    """The commit: from here on config.json is the new one, and leads to the new weights."""
    config = json.loads((staging / CONFIG_FILE).read_text(encoding="utf-8"))
    pointing = staging.parent / CONFIG_FILE
    _write_json(pointing, config | {POINTER: pointer})
    sync(staging.parent)
    os.replace(pointing, target / CONFIG_FILE)
    sync(target)


def _move(
    staging: Path, target: Path, new: list[Path], stale: Collection[str], leave: bool
) -> None:
    """Put files in their places, weights before their index, and remove what is stale.

    With `leave`, all but config.json stay in the staging folder, too. config.json, which leads
    there until then, comes last: who goes by the names in a folder takes a single file for all of
    its weights, even if an index stands beside it.
    """
    config = Path(CONFIG_FILE)
    for path in sorted(set(new) - {config}, key=lambda path: (path.suffix == ".json", path)):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(_link(staging, path) if leave else staging / path, target / path)
    for name in stale:
        (target / name).unlink(missing_ok=True)
    sync(target)
    if config in new:
        os.replace(staging / config, target / config)
        sync(target)


def _link(staging: Path, path: Path) -> Path:
    """A second name for a staged file, or a copy of it where there are no links."""
    second = staging.parent / "second"
    try:
        os.link(staging / path, second)
    except OSError:
        shutil.copyfile(staging / path, second)
        sync(second)
    return second


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sync(path)
