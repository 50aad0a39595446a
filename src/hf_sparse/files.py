"""Which files of a folder or repository belong to a sparse checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatch

from .report import EVALUATION_FILE, REPORT_FILE

_OWN = ("model*.safetensors", "model*.safetensors.index.json", REPORT_FILE, EVALUATION_FILE)


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
