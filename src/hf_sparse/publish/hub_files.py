"""What lies beside the files that a model was loaded from, in its folder or on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCard, constants, hf_hub_download, metadata_load
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HFValidationError,
    HTTPError,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from yaml import YAMLError

from ..core.logging import get_logger
from .hub_errors import one_line

T = TypeVar("T")

logger = get_logger(__name__)

CARD = "README.md"
# What a derived model's card takes over.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def hub_id(source: str) -> str | None:
    """The source, if it can be a repository's id and is no folder here."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return None if Path(source).exists() else source


def source_file(source: str, name: str) -> Path | None:
    """A file in a model's folder or Hub repository; None if there is none, or it can't be had."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    if hub_id(source) is None:
        return None
    try:
        return _download(source, name)
    except (HTTPError, OSError) as error:
        said = one_line(error)
        logger.warning("%s of %s can't be had, the card goes without it: %s", name, source, said)
        return None


@lru_cache(maxsize=64)
def _download(repo_id: str, name: str) -> Path | None:
    """Remembers what was found, and what isn't there, but no failure."""
    try:
        return Path(hf_hub_download(repo_id, name))
    except RemoteEntryNotFoundError:
        return None


def read_card(path: Path | None) -> ModelCard | None:
    """A model card from a file; None if there is none, or its metadata can't be used."""
    return None if path is None else _read(ModelCard.load, path)


def inherited(source: str) -> dict[str, Any]:
    """The metadata that a model takes over from the card of the one it was loaded from.

    With `base_model`, which holds for what was loaded sparse; a dense model's base is another one.
    Anything but a line of text, or a list of them, is left out.
    """
    path = source_file(source, CARD)
    metadata = _read(metadata_load, path) if path else None
    metadata = metadata if isinstance(metadata, dict) else {}
    found = {key: metadata.get(key) for key in (*INHERITED, "base_model")}
    link = found.get("license_link")
    if isinstance(link, str) and "://" not in link and hub_id(source):
        found["license_link"] = f"{constants.ENDPOINT}/{source}/blob/main/{link}"
    return {key: value for key, value in found.items() if value and _is_text(value)}


def _read(read: Callable[[Path], T], path: Path) -> T | None:
    """What a reader of huggingface_hub makes of a file that anybody may have written."""
    try:
        return read(path)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, YAMLError) as error:
        logger.warning("the metadata of %s can't be read: %s", path, one_line(error))
        return None


def _is_text(value: Any) -> bool:
    lines = value if isinstance(value, list) else [value]
    return all(isinstance(line, str) and line.isprintable() for line in lines)
