"""Files that lie beside a checkpoint's weights, and that transformers doesn't fetch."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import cached_file

SNAPSHOTS = "snapshots"  # of the Hub's cache: .../models--OWNER--NAME/snapshots/COMMIT


def companion(folder: Path, name: str) -> Path:
    """The path of a file beside the weights; where these lie in the Hub's cache it is fetched, of
    the same commit.

    Args:
        folder: where the weights lie.
        name: of the file.

    Raises:
        OSError: the repository has no such file, or the Hub can't be reached.
    """
    for inner in (folder, *folder.parents):
        repository, models = inner.parent.parent, inner.parent.parent.name.startswith("models--")
        if inner.parent.name == SNAPSHOTS and models:
            cached_file(
                repository.name.removeprefix("models--").replace("--", "/"),
                name,
                cache_dir=str(repository.parent),
                revision=inner.name,
                subfolder=folder.relative_to(inner).as_posix().removeprefix("."),
            )
            break
    return folder / name
