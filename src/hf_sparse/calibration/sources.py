"""Where calibration data come from: files, data sets of the Hub, and whatever can be iterated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch

from ..core.errors import CalibrationError
from .files import FILE_TYPES, file_type, read_file, root_cause
from .items import Item, Kind, kind_of
from .parquet_rows import ParquetRows

# The names that the field's papers use, and where these data live on the Hub.
HUB_NAMES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[^\s:/\\]+)?", re.ASCII)


def open_source(
    dataset: Any, seed: int, num_samples: int, split: str, in_order: bool = False
) -> tuple[Iterator[Item], str]:
    """The items in the order in which they are drawn, and a name for the source.

    Args:
        in_order: of text, all of it as it stands, whatever the seed.

    Raises:
        CalibrationError: there is nothing of that name, it can't be read, or is of no known kind.
    """
    if isinstance(dataset, str | Path):
        path = _existing_file(dataset)
        if path is None:
            return _numbered(_read_hub(str(dataset), split)), str(dataset)
        pages = read_file(path)
        return _drawn(pages, None if in_order else seed, None), path.name
    if not _has_places(dataset) and not isinstance(dataset, Iterable):
        raise CalibrationError(
            f"dataset of type {type(dataset).__name__} can't be iterated: pass a Hub id, a path, "
            "or an iterable of strings, token ids or dicts of model inputs"
        )
    source = type(dataset).__name__
    if type(dataset).__module__.partition(".")[0] == "pandas":
        raise CalibrationError(
            f"dataset is a {source} of pandas: pass datasets.Dataset.from_pandas(...), or a list "
            "of its rows or values"
        )
    if isinstance(dataset, Mapping):
        dataset = _one_split(dataset, split) or _rows_of(dataset)
    if not _has_places(dataset):
        return _numbered(dataset), source
    every = (Item(i, dataset[i]) for i in range(len(dataset)))
    first = next((item for item in every if item.kind is not Kind.BLANK), None)
    if first is None or not first.is_textual:
        return _drawn(dataset, seed, num_samples), source
    _check_no_file_name(first.value)
    return _drawn(dataset, None if in_order else seed, None), source


def check_source(dataset: Any) -> None:
    """Raise a CalibrationError if data that are named can't be there, before anything is read."""
    if isinstance(dataset, str | Path) and _existing_file(dataset) is None:
        _require_datasets(str(dataset))


def is_at_hand(dataset: Any) -> bool:
    """Can data be read without a network, and as often as one likes?"""
    if isinstance(dataset, str | Path):
        return _existing_file(dataset) is not None
    return isinstance(dataset, Mapping) or _has_places(dataset)


def _has_places(dataset: Any) -> bool:
    """Can its items be drawn by number, as those of a list, or of one of torch's data sets?"""
    return isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")


def _existing_file(name: str | Path) -> Path | None:
    """The file of that name; None if it can only be a data set of the Hub.

    Raises:
        CalibrationError: it is a folder, a file that isn't there, or a text.
    """
    try:
        path = Path(name).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError):  # no path could be called that
        path, is_folder, exists = Path(), False, False
    if is_folder:
        saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        what = "datasets.load_from_disk(...) of it" if saved else "one file of it"
        raise CalibrationError(f"dataset {str(name)!r} is a folder: pass {what}")
    if exists:
        return path
    name = str(name)
    known_type = file_type(path) in FILE_TYPES
    in_folder = path.parent != Path() and path.parent.is_dir()
    if HUB_ID.fullmatch(name) and not known_type and not in_folder:
        return None
    if known_type or not re.search(r"\s", name):
        raise CalibrationError(f"dataset {name!r}: there is no such file")
    raise CalibrationError(
        f"dataset is a text of {len(name)} characters ({name[:30]!r}...), not the name of a file "
        "or of a data set on the Hub: pass a list of texts, dataset=[text]"
    )


def _check_no_file_name(text: Any) -> None:
    if isinstance(text, str) and re.fullmatch(r"\S+", text) and file_type(Path(text)) in FILE_TYPES:
        raise CalibrationError(
            f"the dataset's texts are names of files, such as {text!r}: pass the path of one file, "
            "or what the files hold"
        )


def _one_split(dataset: Mapping[str, Any], split: str) -> Any:
    """Of several data sets by the names of their splits, the one that is meant; None of others."""
    if not dataset or not all(hasattr(part, "column_names") for part in dataset.values()):
        return None
    if split in dataset or len(dataset) == 1:
        return dataset.get(split, next(iter(dataset.values())))
    raise CalibrationError(
        f"dataset is a {type(dataset).__name__} of {', '.join(dataset)}, and has no {split!r}: "
        f"pass one of them, dataset[{next(iter(dataset))!r}]"
    )


def _rows_of(dataset: Mapping[str, Any]) -> list[Any]:
    """The rows of columns that hold text, as slices of a `Dataset` are; else the one item it is."""
    columns = list(dataset.values())
    if kind_of(dataset) is not Kind.INPUTS or not all(isinstance(c, list) and c for c in columns):
        return [dataset]
    rows = [dict(zip(dataset, row, strict=False)) for row in zip(*columns, strict=False)]
    same = len({len(column) for column in columns}) == 1
    return rows if same and kind_of(rows[0]) in (Kind.TEXT, Kind.ROW) else [dataset]


def _numbered(items: Iterable[Any]) -> Iterator[Item]:
    return (Item(i, value) for i, value in enumerate(items))


def _drawn(items: Any, seed: int | None, limit: int | None) -> Iterator[Item]:
    """Items in seeded order; as they stand without a seed, or if there are at most `limit`."""
    places: Any = range(len(items))
    if seed is not None and (limit is None or len(items) > limit):
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
        places = order if limit is None else order[:limit].sort().values
        places = map(int, places.numpy())
    if isinstance(items, ParquetRows):
        return (Item(i, row) for i, row in items.each(places))
    return (Item(i, items[i]) for i in places)


def _read_hub(name: str, split: str) -> Iterator[Any]:
    """A split of a Hub data set, streamed; "id:config" picks a configuration."""
    datasets = _require_datasets(name)
    repository, _, configuration = name.partition(":")
    repository, configuration = HUB_NAMES.get(name, (repository, configuration))
    try:
        stream = datasets.load_dataset(
            repository, configuration or None, split=split, streaming=True
        )
    except Exception as error:  # of whichever library reads it
        raise CalibrationError(
            f"dataset={name!r} is neither a file here nor a data set with a split {split!r} that "
            f"the Hub gave: {root_cause(error)}"
        ) from error
    return _rows(stream, name)


def _require_datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"dataset={name!r} is no file, so it is looked up on the Hub, which needs the package "
            "datasets: pip install datasets"
        ) from None
    return datasets


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
            f"and pass a file ({root_cause(error)})"
        ) from error
