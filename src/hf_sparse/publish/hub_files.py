"""What lies beside the files that a model was loaded from, in its folder or on the Hub."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HFValidationError,
    HTTPError,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from yaml import YAMLError

from ..core.logging import get_logger

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
        first = next(iter(str(error).splitlines()), type(error).__name__)
        logger.warning("%s of %s can't be had, the card goes without it: %s", name, source, first)
        return None


@lru_cache(maxsize=64)
def _download(repo_id: str, name: str) -> Path | None:
    """Remembers what was found, and what isn't there, but no failure."""
    try:
        return Path(hf_hub_download(repo_id, name))
    except RemoteEntryNotFoundError:
        return None


def read_card(path: Path | None) -> ModelCard | None:
    """A model card from a file; None if there is none, or its metadata are no YAML."""
    if path is None:
        return None
    try:
        card: ModelCard = ModelCard.load(path, ignore_metadata_errors=True)
    except (OSError, ValueError, YAMLError) as error:
        logger.warning("the model card %s can't be read: %s", path, error)
        return None
    return card


def inherited(source: str) -> dict[str, Any]:
    """The metadata that a model takes over from the card of the one it was loaded from.

    With `base_model`, which holds for what was loaded sparse; a dense model's base is another one.
    """
    card = read_card(source_file(source, CARD))
    found = {key: card.data.get(key) for key in (*INHERITED, "base_model")} if card else {}
    link = found.get("license_link")
    if isinstance(link, str) and "://" not in link and hub_id(source):
        found["license_link"] = f"{ENDPOINT}/{source}/blob/main/{link}"
    return {key: value for key, value in found.items() if value is not None}
