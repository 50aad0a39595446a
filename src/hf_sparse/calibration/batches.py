"""Calibration data: whatever users pass -> batches of model inputs, the same for the same seed.

What an item of the data may be decides what becomes of it:

- a dict of model inputs is one batch, as it is (1-D inputs get a batch dimension);
- a row with images, sound or a conversation is what the processor makes of it (`rows`): a sample,
  put into one batch with the next if their shapes agree, or text;
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..core.data_record import DataRecord
from ..core.errors import CalibrationError
from .processor_rows import RowReader
from .sources import is_row, open_source, text_of

Batch = dict[str, Tensor]


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
    keep_labels: bool = False,
    split: str = "train",
) -> CalibrationData:
    """Turn a `SparseConfig.dataset` into batches; see the module's text for the rules.

    Args:
        dataset: Hub id, path, `datasets.Dataset`, or an iterable of str, token ids or dicts.
        load_tokenizer: returns a tokenizer, a processor, or None; only called for text and for
            rows that take a processor.
        num_samples: samples wanted; if there are fewer, all of them are used.
        seq_len: tokens a sample has (text) or may have (ids).
        batch_size: samples per batch, rows of unlike shapes apart; dicts of model inputs are
            batches already.
        seed: order in which items are drawn.
        vocab_size: ids must be below it; None skips the check.
        keep_labels: the model makes its decoder's inputs of `labels`: leave them in dicts without
            `decoder_input_ids`. All others lose them.
        split: of a data set that is named by its Hub id.

    Raises:
        CalibrationError: nothing usable in the data, too little for one sequence, ids outside
            the vocabulary, a file that isn't there, text without a tokenizer, a Hub data set that
            can't be read.
    """
    load_tokenizer = cache(load_tokenizer)
    items, source = open_source(dataset, seed, num_samples, split)
    first, items = _peek(items, source)
    if is_row(first):
        rows = _read_rows(items, RowReader.of(first, load_tokenizer()), num_samples, batch_size)
        first, items = _peek(rows, source)
    if isinstance(first, Mapping) and not isinstance(text_of(first), str):
        taken = enumerate(_take(items, num_samples))
        batches = [_as_inputs(item, i, keep_labels) for i, item in taken]
        samples = [row for batch in batches for row in batch.get("input_ids", ())]
        count = sum(len(batch.get("input_ids", next(iter(batch.values())))) for batch in batches)
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


def _peek(items: Iterator[Any], source: str) -> tuple[Any, Iterator[Any]]:
    """The first item, and all of them."""
    first = next(items, None)
    if first is None:
        raise CalibrationError(f"dataset {source} is empty: pass at least one text or sequence")
    return first, itertools.chain([first], items)


def _read_rows(
    rows: Iterator[Any], reader: RowReader, num_samples: int, batch_size: int
) -> Iterator[Any]:
    """The texts of rows, or the model inputs of at most `num_samples`, in batches of like shapes.

    Nothing is padded: how is each processor's own business, and statistics would have to know.
    """
    if reader.text_alone:
        yield from (reader.text(row, index) for index, row in enumerate(rows))
        return
    alike: list[Mapping[str, Tensor]] = []
    for inputs in reader.inputs(_take(rows, num_samples)):
        same = alike and _shapes(inputs) == _shapes(alike[0])
        if alike and (not same or len(alike) == batch_size):
            yield _joined(alike)
            alike = []
        alike.append(inputs)
    yield _joined(alike)


def _shapes(inputs: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in inputs.items()}


def _joined(samples: list[Mapping[str, Tensor]]) -> Batch:
    return {key: torch.cat([sample[key] for sample in samples]) for key in samples[0]}


def _from_texts(
    items: Iterable[Any], tokenizer: Any, num_samples: int, seq_len: int, source: str
) -> list[Tensor]:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    if not hasattr(tokenizer, "all_special_ids"):
        found = "no tokenizer" if tokenizer is None else f"only a {type(tokenizer).__name__}"
        raise CalibrationError(
            f"the dataset is text, and {found} came with the model: pass tokenizer="
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
    text = text_of(item)
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


def _as_inputs(item: Any, index: int, keep_labels: bool) -> Batch:
    """One dict of model inputs as a batch, without labels unless the decoder's inputs are those."""
    if not isinstance(item, Mapping):
        raise CalibrationError(
            f"item {index} of the dataset is a {type(item).__name__}, the first one is a dict: "
            "pass items of one kind"
        )
    needed = keep_labels and "decoder_input_ids" not in item
    batch = {key: _as_tensor(value) for key, value in item.items() if needed or key != "labels"}
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
