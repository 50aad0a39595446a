"""Which tokenizer belongs to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .logging import get_logger

logger = get_logger(__name__)


def known_tokenizer(model: Any) -> Any:
    """The tokenizer of a sparse model's config, or the one beside the files it was loaded from.

    None if there is neither.
    """
    given = model.hf_quantizer.quantization_config.tokenizer
    if given is not None and not isinstance(given, str | Path):
        return given
    found = (find_tokenizer(source) for source in (given, model.name_or_path) if source)
    return next((tokenizer for tokenizer in found if tokenizer is not None), None)


def find_tokenizer(source: str | Path, revision: str | None = None) -> Any:
    """The tokenizer in a folder or at a Hub id; None if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        logger.debug("no tokenizer at %s: %s", source, error)
        return None
    # Where there are no files, transformers may make one up, of special tokens and at most "▁".
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    return tokenizer if len(words) > 1 else None
