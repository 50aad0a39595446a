"""Which tokenizer or processor belongs to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer

from ..core.errors import CalibrationError
from ..core.logging import get_logger

logger = get_logger(__name__)

MISSING = (OSError, ValueError, KeyError, ImportError)


def load_tokenizer(given: Any, model: Any) -> Any:
    """What turns data into inputs: the tokenizer or processor given, as an id, a path or itself,
    else the model's, also from within the GGUF file that it was loaded from; None if the model
    names none.

    Raises:
        CalibrationError: there is nothing to be loaded where one is named.
    """
    if given is not None and not isinstance(given, (str, Path)):
        return given
    source = given or getattr(getattr(model, "config", None), "name_or_path", None)
    if not source:
        return None
    settings = {} if given else _gguf_settings(model)
    try:
        if not settings:  # a GGUF file has no processor, and is slow to look into
            return AutoProcessor.from_pretrained(source)
    except MISSING as error:
        logger.info("no processor could be loaded from %r: %s", str(source), error)
    try:
        return AutoTokenizer.from_pretrained(source, **settings)
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"no tokenizer or processor could be loaded from {str(source)!r}: pass tokenizer= an "
            f"id, a path or an object ({error})"
        ) from error


def _gguf_settings(model: Any) -> dict[str, str]:
    """What transformers needs to find a tokenizer in the file that a model was loaded from."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    file = getattr(config, "gguf_file", None)
    return {"gguf_file": file} if file else {}


def known_processor(model: Any) -> Any:
    """What a sparse model was pruned with, or else what lies beside the files it was loaded from.

    What the config of a loaded checkpoint names isn't looked for: whoever wrote that could name
    files of this machine.

    A processor if there is one, else a tokenizer; None if there is neither.
    """
    quantizer = model.hf_quantizer
    given = None if quantizer.pre_quantized else quantizer.quantization_config.tokenizer
    if given is not None and not isinstance(given, str | Path):
        return given
    found = (find_processor(source) for source in (given, model.name_or_path) if source)
    return next((processor for processor in found if processor is not None), None)


def find_processor(
    source: str | Path, revision: str | None = None, gguf_file: str | None = None
) -> Any:
    """The processor in a folder or at a Hub id, or else the tokenizer; None if neither is."""
    if gguf_file is not None:
        return find_tokenizer(source, revision, gguf_file)
    try:
        processor = AutoProcessor.from_pretrained(source, revision=revision)
    except MISSING as error:
        logger.debug("no processor at %s: %s", source, error)
        return find_tokenizer(source, revision)
    tokenizer = getattr(processor, "tokenizer", processor)
    return None if hasattr(tokenizer, "get_vocab") and _is_made_up(tokenizer) else processor


def find_tokenizer(
    source: str | Path, revision: str | None = None, gguf_file: str | None = None
) -> Any:
    """The tokenizer in a folder, at a Hub id, or in a GGUF file there; None if there is none."""
    settings = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, **settings)
    except MISSING as error:
        logger.debug("no tokenizer at %s: %s", source, error)
        return None
    return None if _is_made_up(tokenizer) else tokenizer


def _is_made_up(tokenizer: Any) -> bool:
    """Where there are no files, transformers may make one up, of special tokens and at most "▁"."""
    return len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) <= 1
