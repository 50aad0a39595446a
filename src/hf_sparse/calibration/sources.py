"""Where calibration data come from: files, data sets of the Hub, and whatever can be iterated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CalibrationError
from .processor_rows import column_kinds

FILE_TYPES = (".txt", ".md", ".jsonl", ".json", ".parquet")
# The names that the field's papers use, and where these data live on the Hub.
HUB_NAMES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}


def open_source(dataset: Any, seed: int, num_samples: int, split: str) -> tuple[Iterator[Any], str]:
    """The items in the order in which they are drawn, and a name for the source."""
    if isinstance(dataset, str | Path):
        path = Path(dataset)
        if path.is_dir():
            raise CalibrationError(f"dataset {str(path)!r} is a folder: pass one file of it")
        if path.exists() or path.suffix in FILE_TYPES:
            return iter(_drawn(_read_file(path), seed, None)), path.name
        return _read_hub(str(dataset), split), str(dataset)
    if not isinstance(dataset, Iterable):
        raise CalibrationError(
            f"dataset of type {type(dataset).__name__} can't be iterated: pass a Hub id, a path, "
            "or an iterable of strings, token ids or dicts of model inputs"
        )
    source = type(dataset).__name__
    if isinstance(dataset, Mapping):
        dataset = [dataset]  # a single batch of model inputs
    if isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        whole = len(dataset) > 0 and _is_text(dataset[0])
        return iter(_drawn(dataset, seed, None if whole else num_samples)), source
    return iter(dataset), source


def is_row(item: Any) -> bool:
    """Is an item a row for a processor, neither a text nor a dict of model inputs?"""
    if not isinstance(item, Mapping) or any(isinstance(v, Tensor) for v in item.values()):
        return False
    kinds = set(column_kinds(item).values())
    several_texts = kinds == {"text"} and not isinstance(text_of(item), str)
    return "input_ids" not in item and (several_texts or bool(kinds - {"text"}))


def _is_text(item: Any) -> bool:
    """Will an item become text, of which a sample may take several, or a part of one?"""
    if is_row(item):
        return not {"images", "audio"} & set(column_kinds(item).values())
    return isinstance(text_of(item), str)


def _drawn(items: Any, seed: int, limit: int | None) -> Iterable[Any]:
    """Items in seeded order; if no more than `limit` are there, all of them as they stand."""
    if limit is not None and len(items) <= limit:
        return (items[i] for i in range(len(items)))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(items), generator=generator).tolist()
    return (items[i] for i in (order if limit is None else sorted(order[:limit])))


def _read_file(path: Path) -> list[Any]:
    """A table's rows, or a text file's documents: separated by lines that hold only a NUL byte."""
    if not path.is_file():
        raise CalibrationError(f"dataset {str(path)!r}: there is no such file")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise CalibrationError(
                "reading parquet needs pyarrow: pip install 'hf_sparse[datasets]'"
            ) from None
        return list(pyarrow.parquet.read_table(path).to_pylist())
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"dataset {path.name} is not UTF-8 text: {error}") from None
    if path.suffix in (".jsonl", ".json"):
        try:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path.name} is not JSON lines: {error}") from None
    return [page for page in re.split(r"\n?\n\0\n", text) if page.strip()]


def _read_hub(name: str, split: str) -> Iterator[Any]:
    """A split of a Hub data set, streamed; "id:config" picks a configuration."""
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"dataset={name!r} is no file, so it is looked up on the Hub, which needs the package "
            "datasets: pip install 'hf_sparse[datasets]'"
        ) from None
    repository, _, configuration = name.partition(":")
    repository, configuration = HUB_NAMES.get(name, (repository, configuration))
    try:
        stream = datasets.load_dataset(
            repository, configuration or None, split=split, streaming=True
        )
    except Exception as error:  # of whichever library reads it
        raise CalibrationError(
            f"dataset={name!r} is neither a file here nor a data set with a split {split!r} that "
            f"the Hub gave: {_line(error)}"
        ) from error
    return _rows(stream, name)


def _rows(stream: Iterable[Any], name: str) -> Iterator[Any]:
    """The rows of a stream; what breaks it off becomes one sentence."""
    read = 0
    try:
        for row in stream:
            read += 1
            yield row
    except Exception as error:
        raise CalibrationError(
            f"dataset={name!r} broke off on the Hub after {read} rows: try again, or download it "
            f"and pass a file ({_line(error)})"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def text_of(item: Any) -> Any:
    """An item's text if it has one: the string itself, or a row's "text" or only column."""
    if not isinstance(item, Mapping) or "input_ids" in item:
        return item
    if "text" in item:
        return item["text"]
    return next(iter(item.values())) if len(item) == 1 else None
