"""Calibration data: whatever users pass -> batches of model inputs, the same for the same seed.

What becomes of an item is decided by its kind (`items`):

- a dict of model inputs is one batch, as it is (1-D inputs get a batch dimension);
- a row with images, sound or a conversation is what the processor makes of it (`processor_rows`): a
  sample, put into one batch with the next if their shapes agree, or text;
- token ids are one sample, cut to `seq_len`; samples of a batch are padded on the right to the
  longest, and an attention mask marks the padding;
- text becomes samples of token ids (`packing`).

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
from torch.nn.utils.rnn import pad_sequence

from ..core.data_record import DataRecord
from ..core.errors import CalibrationError
from .items import Item, Kind
from .packing import Texts, make_samples
from .processor_rows import RowReader
from .sources import open_source
from .token_masks import token_mask

Batch = dict[str, Tensor]

# Items with nothing in them that are looked through for the first that tells what the data are.
MOST_BLANK = 100_000


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
    join_documents: bool = False,
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
        split: of a data set that is named by its Hub id, or of a `DatasetDict`.
        join_documents: texts are one text, with blank lines between; see `packing`.

    Raises:
        CalibrationError: nothing usable in the data, too little for one sequence, ids outside
            the vocabulary, a file that isn't there, text without a tokenizer, a Hub data set that
            can't be read.
    """
    load_tokenizer = cache(load_tokenizer)
    items, source = open_source(dataset, seed, num_samples, split, join_documents)
    kind, first, items = _look(items, source)
    reader = RowReader.of(first.value, load_tokenizer()) if kind is Kind.ROW else None
    if kind is Kind.TEXT or (reader and reader.text_alone):
        texts = Texts(source, reader.texts(items) if reader else map(_numbered_text, items))
        samples = make_samples(
            texts,
            load_tokenizer(),
            num_samples=num_samples,
            seq_len=seq_len,
            seed=seed,
            join=join_documents,
        )
        batches = _collated(samples, batch_size)
    else:
        taken: Iterator[Item] = itertools.islice(items, num_samples)
        if kind is Kind.IDS:
            batches = _collated([_as_ids(item)[:seq_len] for item in taken], batch_size)
        else:
            if reader:
                taken = map(
                    Item, itertools.count(), _of_like_shapes(reader.inputs(taken), batch_size)
                )
            batches = [_as_inputs(item, keep_labels) for item in taken]
    if vocab_size is not None:
        _check_vocabulary(batches, vocab_size)
    count = sum(len(batch.get("input_ids", next(iter(batch.values())))) for batch in batches)
    tokens = sum(_token_count(batch) for batch in batches)
    record = DataRecord(source, _digest(batches), count, tokens)
    return CalibrationData(tuple(batches), record)


def _look(items: Iterator[Item], source: str) -> tuple[Kind, Item, Iterator[Item]]:
    """What kind of items there are, the first that tells it, and all of them."""
    seen: list[Item] = []
    for item in items:
        seen.append(item)
        if item.kind is not Kind.BLANK:
            return item.kind, item, itertools.chain(seen, items)
        if len(seen) == MOST_BLANK:
            raise CalibrationError(f"dataset {source}: its first {MOST_BLANK:,} items are blank")
    if seen:
        raise CalibrationError(f"dataset {source} has no text in it: all items are blank")
    raise CalibrationError(f"dataset {source} is empty: pass at least one text or sequence")


def _numbered_text(item: Item) -> tuple[int, str]:
    if item.text is None:
        value = item.value
        columns = f" with columns {', '.join(value)}" if isinstance(value, Mapping) else ""
        raise CalibrationError(
            f"the dataset mixes text with a {type(value).__name__}{columns} (item {item.index}): "
            "every item must be a string, or a row whose text is in a column 'text'"
        )
    return item.index, item.text


def _of_like_shapes(samples: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Samples in batches of like shapes.

    Nothing is padded: how is each processor's own business, and statistics would have to know.
    """
    alike: list[Batch] = []
    for inputs in samples:
        same = alike and _shapes(inputs) == _shapes(alike[0])
        if alike and (not same or len(alike) == batch_size):
            yield _joined(alike)
            alike = []
        alike.append(inputs)
    yield _joined(alike)


def _shapes(inputs: Batch) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in inputs.items()}


def _joined(samples: list[Batch]) -> Batch:
    return {key: torch.cat([sample[key] for sample in samples]) for key in samples[0]}


def _as_ids(item: Item) -> Tensor:
    value = item.value
    alone = isinstance(value, tuple) and len(value) == 1  # as torch's TensorDataset has them
    ids = _as_tensor(value[0] if alone else value)
    if ids is not None and ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids is None or ids.ndim != 1 or not _are_integers(ids) or ids.numel() == 0:
        shape = f" of shape {tuple(ids.shape)} and {ids.dtype}" if ids is not None else ""
        raise CalibrationError(
            f"item {item.index} of the dataset is a {type(item.value).__name__}{shape}: expected a "
            "string, a dict of model inputs, or a non-empty 1-D sequence of integer token ids"
        )
    return ids.to(torch.int64)


def _are_integers(values: Tensor) -> bool:
    dtype = values.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _as_inputs(item: Item, keep_labels: bool) -> Batch:
    """One dict of model inputs as a batch, without labels unless the decoder's inputs are those."""
    if not isinstance(item.value, Mapping):
        raise CalibrationError(
            f"item {item.index} of the dataset is a {type(item.value).__name__}, the first one is "
            "a dict: pass items of one kind"
        )
    needed = keep_labels and "decoder_input_ids" not in item.value
    left_out = {"labels"} if not needed else set()
    if "input_ids" in item.value:  # the text that these were made of
        left_out |= {key for key, value in item.value.items() if isinstance(value, str)}
    batch = {k: _as_tensor(value) for k, value in item.value.items() if k not in left_out}
    wrong = [
        key
        for key, value in batch.items()
        if value is None or value.ndim == 0 or not isinstance(key, str)
    ]
    if wrong or not batch:
        raise CalibrationError(
            f"item {item.index} of the dataset holds {', '.join(map(repr, wrong)) or 'nothing'}, "
            "which is no tensor: a dict must map names of model inputs to tensors or lists of "
            "numbers, or 'text' to a string"
        )
    tensors: Batch = {key: value for key, value in batch.items() if value is not None}
    ids = tensors.get("input_ids")
    if ids is not None and ids.numel() and not _are_integers(ids):
        raise CalibrationError(
            f"item {item.index} of the dataset has input_ids of {ids.dtype}: expected integers"
        )
    if ids is not None and ids.ndim == 1:
        tensors = {key: value.unsqueeze(0) for key, value in tensors.items()}
    _check_masks(item.index, tensors)
    return tensors


def _check_masks(index: int, tensors: Batch) -> None:
    """A mask of each token has the shape of the ids; one of pairs of tokens may have another."""
    for side in ("", "decoder_"):
        ids, mask = tensors.get(f"{side}input_ids"), tensors.get(f"{side}attention_mask")
        if ids is not None and mask is not None and mask.ndim == 2 and mask.shape != ids.shape:
            raise CalibrationError(
                f"item {index} of the dataset has {side}attention_mask of shape "
                f"{tuple(mask.shape)}, expected {tuple(ids.shape)} as its {side}input_ids"
            )


def _as_tensor(value: Any) -> Tensor | None:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _collated(samples: list[Tensor], batch_size: int) -> list[Batch]:
    """Samples, 1-D, in batches; those of different lengths are padded on the right."""
    starts = range(0, len(samples), batch_size)
    return [_padded(samples[start : start + batch_size]) for start in starts]


def _padded(samples: list[Tensor]) -> Batch:
    ids = pad_sequence(samples, batch_first=True)
    if all(len(sample) == ids.shape[1] for sample in samples):
        return {"input_ids": ids}
    mask = pad_sequence([torch.ones_like(sample) for sample in samples], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


def _check_vocabulary(batches: Iterable[Batch], vocab_size: int) -> None:
    samples = (row for batch in batches for row in batch.get("input_ids", ()))
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
    mask = token_mask(batch.get("attention_mask"))
    if mask is not None:
        return int(mask.sum())
    return batch["input_ids"].numel() if "input_ids" in batch else 0


def _digest(batches: Iterable[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            tensor = batch[key].contiguous()
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
