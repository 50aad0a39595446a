"""Perplexity of a causal language model, over blocks or sliding windows.

With x the tokens of a sequence, the perplexity is

    exp(- 1/|S| sum over t in S of log p(x_t | x_0 .. x_{t-1} within the window)).

Blocks: each sample (a block of `seq_len` tokens, if the data are text) is a window of its own, and
S is all its tokens but the first. This is what the pruning papers report, of joined documents.
Sliding windows: the samples in a row are one sequence; windows of `seq_len` tokens begin every
`stride` tokens, and each scores the tokens that the windows before did not. It needs
seq_len / stride times the work and gives each token more context, so its value is lower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..core.data_record import DataRecord
from ..core.errors import EvaluationError
from ..core.logging import progress_bar
from ..core.renamed import renamed_arguments
from ..core.untrusted_text import brief
from ..core.whole_number import whole_number
from ..kernels.cpu.wide import wide_products
from .data import evaluating, load_data, to_device, token_mask


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` measured.

    Attributes:
        perplexity: exp(nll); infinite if that overflows.
        nll: mean negative log-likelihood of a scored token, in nats.
        tokens: number of scored tokens.
        windows: number of windows.
        seq_len: longest window, in tokens.
        stride: tokens from a window's start to the next one's; None for blocks.
        data: where the data came from, with their digest.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seq_len: int
    stride: int | None
    data: DataRecord

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        how = "blocks" if self.stride is None else f"sliding windows, stride {self.stride}"
        return (
            f"perplexity {self.perplexity:.3f} ({self.tokens} tokens of {self.data.source}; "
            f"{self.windows} {how} of {self.seq_len})"
        )


@renamed_arguments(data="dataset")
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    dataset: Any,
    seq_len: int | None = None,
    *,
    stride: int | None = None,
    num_samples: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    split: str = "test",
    join_documents: bool = False,
) -> Perplexity:
    """Measure a causal language model's perplexity; logits are normalised in fp32.

    Args:
        model: a transformers causal language model, sparse or dense.
        tokenizer: its tokenizer; None if the data are token ids.
        dataset: as `SparseConfig.dataset`: a path, strings, token ids, ... Text is packed as for
            calibration: each document behind the BOS token, cut into blocks. Documents of a file
            are drawn in an order given by `seed`; to keep an order, pass an iterator.
        seq_len: tokens of a window. Default min(2048, what the model allows).
        stride: None for blocks; 1 <= stride < seq_len for sliding windows.
        num_samples: blocks or sequences to use at most. Default all.
        batch_size: blocks per forward pass; sliding windows go one by one.
        seed: order in which documents are drawn.
        split: which split of a data set named by its Hub id, or of a `DatasetDict`.
        join_documents: join all texts, in their order, with blank lines, tokenise them as one text
            and cut that into blocks: with `dataset="wikitext2"` and `seq_len=2048` what the papers
            report (GPTQ, SparseGPT, Wanda). Otherwise each text is behind a BOS of its own.

    Raises:
        EvaluationError: an argument is out of range, or the model is no causal language model.
        CalibrationError: the data are unusable.
    """
    loaded, seq_len = load_data(model, lambda: tokenizer, dataset, seq_len=seq_len,
        num_samples=num_samples, batch_size=batch_size, seed=seed, split=split,
        join_documents=join_documents)  # fmt: skip
    if stride is not None and not 1 <= (whole_number(stride) or 0) < seq_len:
        raise EvaluationError(
            f"stride={brief(stride)} must be an integer of at least 1 and less than "
            f"seq_len={seq_len}; leave it out for blocks"
        )
    windows = (
        [(batch, 1) for batch in loaded.batches]
        if stride is None
        else list(_sliding(loaded.batches, seq_len, stride))
    )
    total, tokens = 0.0, 0
    bar = progress_bar(len(windows), "Perplexity")
    with evaluating(model), wide_products(model), bar:
        for batch, first in windows:
            losses = _losses(model, to_device(batch, model), first)
            total += losses.sum(dtype=torch.float64).item()
            tokens += losses.numel()
            bar.update()
    if tokens == 0:
        raise EvaluationError("no sample has two tokens: there is nothing to predict")
    nll = total / tokens
    return Perplexity(
        perplexity=math.inf if nll >= 700 else math.exp(nll),
        nll=nll,
        tokens=tokens,
        windows=sum(len(batch["input_ids"]) for batch, _ in windows),
        seq_len=seq_len,
        stride=stride,
        data=loaded.record,
    )


def _sliding(batches: Sequence[Batch], seq_len: int, stride: int) -> Iterator[tuple[Batch, int]]:
    """Windows over all samples in a row, each with the index of the first token it scores."""
    stream = torch.cat([batch["input_ids"][token_mask(batch)] for batch in batches])
    scored = 1
    for start in range(0, len(stream), stride):
        end = min(start + seq_len, len(stream))
        yield {"input_ids": stream[None, start:end]}, scored - start
        scored = end
        if end == len(stream):
            break


def _losses(model: nn.Module, batch: Batch, first: int) -> Tensor:
    """-log p of each token from index `first` on that is no padding, in a row."""
    ids, mask = batch["input_ids"], token_mask(batch)
    logits: Tensor = model(**batch, use_cache=False).logits
    wanted = mask[:, first:] & mask[:, first - 1 : -1]
    # A sample at a time: logits in fp32 are the largest tensor here.
    rows = [
        F.cross_entropy(
            logits[i, first - 1 : -1].float(), ids[i, first:].to(logits.device), reduction="none"
        )[wanted[i].to(logits.device)]
        for i in range(len(ids))
    ]
    return torch.cat(rows)
