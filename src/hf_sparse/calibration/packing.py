"""Texts -> samples of token ids.

- If the tokenizer ends each text with a token of its own ([SEP], </s>: encoders), a text is one
  sample, truncated to `seq_len`.
- Otherwise texts are packed: each document's ids without special tokens, behind the BOS (or, if
  there is none, the EOS) token, all documents in a row, cut into sequences of exactly `seq_len`;
  the rest is dropped. Blank documents are left out.
- Joined, as the papers do with wikitext2: all texts, blank ones too, with a blank line between each
  two, are one text to the tokenizer, whose ids are cut into sequences of exactly `seq_len`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CalibrationError
from ..core.logging import get_logger

logger = get_logger(__name__)

# More than any tokenizer's mean over running text: what is read of a stream before it is joined.
CHARACTERS_PER_TOKEN = 16


@dataclass
class Texts:
    """Texts with their places in the user's data, in the order in which they are drawn.

    Attributes:
        source: the data's name.
        blank: how many that hold nothing were left out so far.
    """

    source: str
    numbered: Iterable[tuple[int, str]]
    blank: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for index, text in self.numbered:
            if text and not text.isspace():
                yield index, text
            else:
                self.blank += 1


def make_samples(
    texts: Texts, tokenizer: Any, *, num_samples: int, seq_len: int, seed: int, join: bool
) -> list[Tensor]:
    """At most `num_samples` samples of token ids, 1-D, of at most `seq_len`.

    Args:
        seed: joined texts that give more samples than wanted are drawn from by it.
        join: join the texts; see the module's text.

    Raises:
        CalibrationError: there is no tokenizer, it can't read a text, or there is too little text.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    if not hasattr(tokenizer, "all_special_ids"):
        found = "no tokenizer" if tokenizer is None else f"only a {type(tokenizer).__name__}"
        raise CalibrationError(
            f"the dataset is text, and {found} came with the model: pass tokenizer="
        )
    if join:
        samples = _joined(texts, tokenizer, num_samples, seq_len, seed)
    else:
        drawn = iter(texts)
        first = next(drawn, None)
        if first is None:
            raise CalibrationError(f"dataset {texts.source} has no text in it")
        drawn = itertools.chain([first], drawn)
        one_each = _frames_each_text(tokenizer, *first)
        make = _truncated if one_each else _packed
        samples = make(drawn, tokenizer, num_samples, seq_len, texts.source)
    if texts.blank:
        logger.warning(
            "%d texts of dataset %s are blank and were left out", texts.blank, texts.source
        )
    _warn_of_unknown(samples, tokenizer, texts.source)
    return samples


def _truncated(
    texts: Iterable[tuple[int, str]], tokenizer: Any, num_samples: int, seq_len: int, source: str
) -> list[Tensor]:
    samples, cut = [], 0
    for index, text in itertools.islice(texts, num_samples):
        settings = {"truncation": True, "max_length": seq_len}
        ids = _first_ids(tokenizer, index, text, seq_len, **settings)
        samples.append(torch.tensor(ids))
        cut += len(ids) == seq_len
    if cut and len(samples) < num_samples:
        logger.warning(
            "%d texts of dataset %s may be longer than seq_len=%d, and their ends were cut off; "
            "this tokenizer closes each text, so each is one sample: pass long texts in pieces",
            cut,
            source,
            seq_len,
        )
    return samples


def _packed(
    texts: Iterable[tuple[int, str]], tokenizer: Any, num_samples: int, seq_len: int, source: str
) -> list[Tensor]:
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    opening = [token for token in specials if token is not None][:1]
    stream: list[int] = []
    for index, text in texts:
        missing = num_samples * seq_len - len(stream)
        stream += opening + _first_ids(tokenizer, index, text, missing, add_special_tokens=False)
        if len(stream) >= num_samples * seq_len:
            break
    return list(_cut(stream, seq_len, source)[:num_samples])


def _joined(
    texts: Texts, tokenizer: Any, num_samples: int, seq_len: int, seed: int
) -> list[Tensor]:
    pages, missing = [], CHARACTERS_PER_TOKEN * num_samples * seq_len
    for _, text in texts.numbered:
        pages.append(text)
        missing -= len(text)
        if missing <= 0:
            break
    samples = _cut(_ids(tokenizer, 0, "\n\n".join(pages)), seq_len, texts.source)
    if len(samples) <= num_samples:
        return list(samples)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return list(samples[order[:num_samples].sort().values])


def _cut(stream: list[int], seq_len: int, source: str) -> Tensor:
    """A stream's full sequences, (n, seq_len)."""
    count = len(stream) // seq_len
    if count == 0:
        raise CalibrationError(
            f"dataset {source} has {len(stream)} tokens, fewer than one sequence of {seq_len}: "
            "pass more text or a smaller seq_len"
        )
    return torch.tensor(stream[: count * seq_len]).view(count, seq_len)


def _frames_each_text(tokenizer: Any, index: int, text: str) -> bool:
    """Does the tokenizer close a text with a special token, as encoders' do?"""
    text = text[:1000]
    ids, own = _ids(tokenizer, index, text), _ids(tokenizer, index, text, add_special_tokens=False)
    closed = not own or ids[-len(own) :] != own
    return bool(ids) and closed and ids[-1] in tokenizer.all_special_ids


def _first_ids(tokenizer: Any, index: int, text: str, count: int, **settings: Any) -> list[int]:
    """At least the first `count` token ids of a text, or all.

    A text that is much longer isn't read to its end: its tokens take a hundred times its room.
    """
    length = CHARACTERS_PER_TOKEN * max(count, 64)
    if length < len(text):
        ids = _ids(tokenizer, index, text[:length], **settings)
        if len(ids) >= count:
            return ids
    return _ids(tokenizer, index, text, **settings)


def _ids(tokenizer: Any, index: int, text: str, **settings: Any) -> list[int]:
    try:
        return list(tokenizer(text, verbose=False, **settings)["input_ids"])
    except Exception as error:  # tokenizers raises nothing more special
        raise CalibrationError(
            f"{type(tokenizer).__name__} can't read item {index} of the dataset: "
            f"{type(error).__name__}: {error}"
        ) from error


def _warn_of_unknown(samples: list[Tensor], tokenizer: Any, source: str) -> None:
    unknown = getattr(tokenizer, "unk_token_id", None)
    total = sum(len(sample) for sample in samples)
    if unknown is None or (count := sum(int((s == unknown).sum()) for s in samples)) * 2 <= total:
        return
    logger.warning(
        "the tokenizer doesn't know %d of the %d tokens of dataset %s: is it the model's own?",
        count,
        total,
        source,
    )
