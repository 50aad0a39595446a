"""The files that hold a checkpoint's weights."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import CheckpointError
from ..core.json_records import read_json
from .commit import INDEX, SINGLE


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint in their order, as its index or its one file says.

    Raises:
        CheckpointError: there are none, the index can't be read or names what is no file here.
    """
    index, single = folder / INDEX, folder / SINGLE
    if not index.is_file():
        if not single.is_file():
            raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")
        return [single]
    try:
        names = read_json(index)["weight_map"].values()
    except (CheckpointError, OSError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: it can't be read: {error!r}") from None
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name
        if not plain or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise CheckpointError(
                f"{index}: it can't be read: it names {name!r}, which is no file beside it"
            )
    return [folder / name for name in sorted(set(names))]
