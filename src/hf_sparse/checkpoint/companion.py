"""Files that lie beside a checkpoint's weights, and that transformers doesn't fetch."""

from __future__ import annotations

import inspect
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import cached_file

SNAPSHOTS = "snapshots"  # of the Hub's cache: .../models--OWNER--NAME/snapshots/COMMIT


def companion(folder: Path, name: str) -> Path:
    """The path of a file beside the weights; where these lie in the Hub's cache it is fetched, of
    the same commit, with the token that `from_pretrained` was given.

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
                token=_token(),
            )
            break
    return folder / name


def _token() -> str | bool | None:
    """The `token` of the call of `from_pretrained` that is under way; None if there is none.

    transformers hands it to none of a quantizer's methods, so it is read where it stands.
    """
    loading = inspect.unwrap(PreTrainedModel.from_pretrained.__func__).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not loading:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("token")
