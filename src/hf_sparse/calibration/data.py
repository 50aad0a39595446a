"""Calibration data: whatever users pass -> batches of model inputs, the same for the same seed.

What an item of the data may be decides what becomes of it:

- a dict of model inputs is one batch, as it is (1-D inputs get a batch dimension);
- token ids are one sample, cut to `seq_len`; samples of a batch are padded on the right to the
  longest, and an attention mask marks the padding;
- text, if the tokenizer ends each text with a token of its own ([SEP], </s>: encoders), is one
  sample, truncated to `seq_len`;
- text otherwise is packed: each document's ids without special tokens, behind the BOS (or, if
  there is none, the EOS) token, all documents in a row, cut into sequences of exactly `seq_len`;
  the rest is dropped.

Of a sized source with more than is needed, items are drawn in an order given by `seed`; from a
plain iterable they are taken as they come. Which samples were used is recorded by their digest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError

Batch = dict[str, Tensor]

FILE_TYPES = (".txt", ".md", ".jsonl", ".json", ".parquet")
# The names that the field's papers use, and where these data live on the Hub.
HUB_NAMES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}


@dataclass(frozen=True)
class DataRecord:
    """How calibration data were made; what a saved config keeps of them.

    Attributes:
        source: the Hub id, a file's name, or the type of the object that was passed.
        digest: SHA-256 of all model inputs in the order used; None before use.
        count: number of samples; None before use.
        tokens: number of tokens (padding not counted); None before use.
    """

    source: str
    digest: str | None = None
    count: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class CalibrationData:
    """Batches ready for the model, on the CPU, and the record of how they were made."""

    batches: tuple[Batch, ...]
    record: DataRecord


def make_batches(
    dataset: Any,
    load_tokenizer: Callable[[], Any],
    *,
    num_samples: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    vocab_size: int | None,
    split: str = "train",
) -> CalibrationData:
    """Turn a `SparseConfig.dataset` into batches; see the module's text for the rules.

    Args:
        dataset: Hub id, path, `datasets.Dataset`, or an iterable of str, token ids or dicts.
        load_tokenizer: returns a tokenizer, or None; only called for text.
        num_samples: samples wanted; if there are fewer, all of them are used.
        seq_len: tokens a sample has (text) or may have (ids).
        batch_size: samples per batch; dicts of model inputs are batches already.
        seed: order in which items are drawn.
        vocab_size: ids must be below it; None skips the check.
        split: of a data set that is named by its Hub id.

    Raises:
        CalibrationError: nothing usable in the data, too little for one sequence, ids outside
            the vocabulary, a file that isn't there, text without a tokenizer, a Hub data set that
            can't be read.
    """
    items, source = _open(dataset, seed, num_samples, split)
    first = next(items, None)
    if first is None:
        raise CalibrationError(f"dataset {source} is empty: pass at least one text or sequence")
    items = itertools.chain([first], items)
    if isinstance(first, Mapping) and not isinstance(_text_of(first), str):
        batches = [_as_inputs(item, i) for i, item in enumerate(_take(items, num_samples))]
        samples = [row for batch in batches for row in batch.get("input_ids", ())]
        count = sum(len(next(iter(batch.values()))) for batch in batches)
    else:
        if isinstance(first, str | Mapping):
            samples = _from_texts(items, load_tokenizer(), num_samples, seq_len, source)
        else:
            samples = [_as_ids(x, i)[:seq_len] for i, x in enumerate(_take(items, num_samples))]
        batches = [
            _collate(samples[start : start + batch_size])
            for start in range(0, len(samples), batch_size)
        ]
        count = len(samples)
    if vocab_size is not None:
        _check_vocabulary(samples, vocab_size)
    tokens = sum(_token_count(batch) for batch in batches)
    record = DataRecord(source, _digest(batches), count, tokens)
    return CalibrationData(tuple(batches), record)


def _open(dataset: Any, seed: int, num_samples: int, split: str) -> tuple[Iterator[Any], str]:
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
        whole = len(dataset) and isinstance(_text_of(dataset[0]), str)
        return iter(_drawn(dataset, seed, None if whole else num_samples)), source
    return iter(dataset), source


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


def _text_of(item: Any) -> Any:
    """An item's text if it has one: the string itself, or a row's "text" or only column."""
    if not isinstance(item, Mapping) or "input_ids" in item:
        return item
    if "text" in item:
        return item["text"]
    return next(iter(item.values())) if len(item) == 1 else None


def _from_texts(
    items: Iterable[Any], tokenizer: Any, num_samples: int, seq_len: int, source: str
) -> list[Tensor]:
    if tokenizer is None:
        raise CalibrationError(
            "the dataset is text, and no tokenizer came with the model: pass tokenizer="
        )
    texts = (_require_text(item) for item in items)
    if _frames_each_text(tokenizer):
        tokenized = (
            tokenizer(text, truncation=True, max_length=seq_len)["input_ids"]
            for text in texts
            if text.strip()
        )
        samples = [torch.tensor(ids) for ids in itertools.islice(tokenized, num_samples)]
        if not samples:
            raise CalibrationError(f"dataset {source} has no text in it")
        return samples
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    opening = [token for token in specials if token is not None][:1]
    stream: list[int] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream += opening + ids
        if len(stream) >= num_samples * seq_len:
            break
    count = min(num_samples, len(stream) // seq_len)
    if count == 0:
        raise CalibrationError(
            f"dataset {source} has {len(stream)} tokens, fewer than one sequence of {seq_len}: "
            "pass more text or a smaller seq_len"
        )
    return list(torch.tensor(stream[: count * seq_len]).view(count, seq_len))


def _require_text(item: Any) -> str:
    text = _text_of(item)
    if not isinstance(text, str):
        columns = f" with columns {', '.join(item)}" if isinstance(item, Mapping) else ""
        raise CalibrationError(
            f"the dataset mixes text with a {type(item).__name__}{columns}: every item must be a "
            "string, or a row whose text is in a column 'text'"
        )
    return text


def _frames_each_text(tokenizer: Any) -> bool:
    """Does the tokenizer close a text with a special token, as encoders' do?"""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[-1] in tokenizer.all_special_ids


def _as_ids(item: Any, index: int) -> Tensor:
    ids = _as_tensor(item)
    if ids is not None and ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids is None or ids.ndim != 1 or ids.dtype.is_floating_point or ids.numel() == 0:
        shape = f" of shape {tuple(ids.shape)} and {ids.dtype}" if ids is not None else ""
        raise CalibrationError(
            f"item {index} of the dataset is a {type(item).__name__}{shape}: expected a string, a "
            "dict of model inputs, or a non-empty 1-D sequence of integer token ids"
        )
    return ids.to(torch.int64)


def _as_inputs(item: Any, index: int) -> Batch:
    """One dict of model inputs as a batch, without labels."""
    if not isinstance(item, Mapping):
        raise CalibrationError(
            f"item {index} of the dataset is a {type(item).__name__}, the first one is a dict: "
            "pass items of one kind"
        )
    batch = {key: _as_tensor(value) for key, value in item.items() if key != "labels"}
    wrong = [key for key, value in batch.items() if value is None or value.ndim == 0]
    if wrong or not batch:
        raise CalibrationError(
            f"item {index} of the dataset holds {', '.join(map(repr, wrong)) or 'nothing'}, which "
            "is no tensor: a dict must map names of model inputs to tensors or lists of numbers"
        )
    tensors: Batch = {key: value for key, value in batch.items() if value is not None}
    if tensors.get("input_ids", torch.empty(0, 0)).ndim == 1:
        tensors = {key: value.unsqueeze(0) for key, value in tensors.items()}
    return tensors


def _as_tensor(value: Any) -> Tensor | None:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _collate(samples: list[Tensor]) -> Batch:
    """Pad samples of different lengths on the right; samples of one length need no mask."""
    longest = max(len(sample) for sample in samples)
    if all(len(sample) == longest for sample in samples):
        return {"input_ids": torch.stack(samples)}
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = sample
        mask[row, : len(sample)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _check_vocabulary(samples: Iterable[Tensor], vocab_size: int) -> None:
    for index, sample in enumerate(samples):
        if sample.numel() == 0:
            raise CalibrationError(f"sample {index} of the dataset has no token")
        low, high = int(sample.min()), int(sample.max())
        if low < 0 or high >= vocab_size:
            raise CalibrationError(
                f"sample {index} of the dataset has token id {low if low < 0 else high}, the "
                f"model's vocabulary has {vocab_size}: was another tokenizer used?"
            )


def _token_count(batch: Batch) -> int:
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel() if "input_ids" in batch else 0


def _digest(batches: Iterable[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            tensor = batch[key].contiguous()
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _take(items: Iterable[Any], count: int) -> Iterator[Any]:
    return itertools.islice(items, count)
