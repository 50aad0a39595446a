"""Arguments as JSON values: data and tokenizers are described, never contained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..core.data_record import DataRecord
from ..core.errors import CheckpointError, ConfigError
from ..core.json_records import read_record


def as_pairs(value: Any) -> Any:
    """`{regex: fraction}` as a list of pairs: the first regex that matches decides, and JSON
    objects are written with sorted keys."""
    return [[regex, share] for regex, share in value.items()] if isinstance(value, dict) else value


def describe_dataset(dataset: Any) -> Any:
    """What a dataset is: a string as it is, anything else by its type."""
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, Path):
        return str(dataset)
    if isinstance(dataset, DataRecord):
        return asdict(dataset)
    items = f" of {type(dataset[0]).__name__}" if isinstance(dataset, list) and dataset else ""
    return asdict(DataRecord(type(dataset).__name__ + items))


def read_dataset(dataset: Any) -> Any:
    """A dataset that `describe_dataset` has described as the record it is; any other as it is.

    Raises:
        ConfigError: it is described by what is no text and no count.
    """
    if not isinstance(dataset, Mapping) or set(dataset) != {f.name for f in fields(DataRecord)}:
        return dataset
    try:
        return read_record(DataRecord, dict(dataset), "dataset")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None


def describe_tokenizer(tokenizer: Any) -> str | None:
    """What a tokenizer is: an id or path as it is, an object by its name or type."""
    if tokenizer is None or isinstance(tokenizer, str):
        return tokenizer
    if isinstance(tokenizer, Path):
        return str(tokenizer)
    return getattr(tokenizer, "name_or_path", None) or type(tokenizer).__name__
