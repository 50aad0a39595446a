"""Does a sparse model predict for the same reasons as the dense one it was made from?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..core.data_record import DataRecord
from ..core.errors import EvaluationError
from ..core.logging import progress_bar
from .attributions import attributions, embedding_of, rank_correlation
from .data import check_positive, evaluating, load_data, to_device, token_mask


@dataclass(frozen=True)
class SampleDrift:
    """One sample.

    Attributes:
        tokens: how many it has.
        rank_correlation: Spearman's, of both models' attributions of its tokens.
        overlap: share of the `top` tokens of largest attribution that both models have in common.
        same_prediction: do both predict the same class, or next token?
    """

    tokens: int
    rank_correlation: float
    overlap: float
    same_prediction: bool


@dataclass(frozen=True)
class ExplanationDrift:
    """What `explanation_drift` measured; `print` it.

    Attributes:
        samples: one each, in the data's order.
        top: how many tokens `overlap` compares, at most.
        times_input: were attributions gradient times input? Else norms of gradients.
        data: where the data came from, with their digest.
    """

    samples: tuple[SampleDrift, ...]
    top: int
    times_input: bool
    data: DataRecord

    @property
    def rank_correlation(self) -> float:
        """Mean over the samples; 1 for the same order of all tokens."""
        return fmean(sample.rank_correlation for sample in self.samples)

    @property
    def overlap(self) -> float:
        """Mean over the samples; 1 for the same most important tokens."""
        return fmean(sample.overlap for sample in self.samples)

    @property
    def same_prediction(self) -> float:
        """Share of the samples for which both models predict the same."""
        return fmean(sample.same_prediction for sample in self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """The means, and a line for each of the first samples."""
        how = "gradient times input" if self.times_input else "norm of the gradient"
        lines = [
            f"explanations ({how}) of {len(self.samples)} samples: rank correlation "
            f"{self.rank_correlation:.3f}, {self.overlap:.1%} of the top {self.top} tokens in "
            f"common, same prediction for {self.same_prediction:.1%}",
            "sample  tokens  rank correlation  overlap  same prediction",
        ]
        lines += [
            f"{i:6}  {s.tokens:6}  {s.rank_correlation:16.3f}  {s.overlap:7.1%}  "
            + ("yes" if s.same_prediction else "no")
            for i, s in enumerate(self.samples[:20])
        ]
        return "\n".join(lines)


def explanation_drift(
    dense: nn.Module,
    sparse: nn.Module,
    data: Any,
    tokenizer: Any = None,
    *,
    top: int = 10,
    times_input: bool = True,
    seq_len: int | None = None,
    num_samples: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    split: str = "test",
) -> ExplanationDrift:
    """Compare what two models' predictions hang on, sample by sample.

    A sample's prediction is its class, or the token that follows its last one. Both models are
    asked about what the dense one predicts: a token's attribution is the gradient g of that log
    probability in the token's embedding e, as g'e (gradient times input) or as |g|. Pruned models
    may keep their predictions and change their reasons: it is the reasons that are compared.

    Args:
        dense: a transformers model with logits (batch, classes) or (batch, tokens, vocabulary).
        sparse: the model made from it.
        data: as `SparseConfig.dataset`: text, token ids, dicts of model inputs.
        tokenizer: of both; for text alone.
        top: tokens of largest size of attribution that are compared, of a sample of more.
        times_input: g'e, whose sign says whether a token speaks for the prediction; else |g|.
        seq_len, num_samples, batch_size, seed, split: as for `perplexity`.

    Raises:
        EvaluationError: an argument is out of range, a model has no input embeddings or predicts
            neither a class nor the next token, their outputs differ in shape, or are no numbers.
        CalibrationError: the data are unusable.
    """
    check_positive(top=top)
    for model in (dense, sparse):
        embedding_of(model)
    # Data that are read in inference mode couldn't be kept for gradients.
    with torch.inference_mode(False), evaluating(dense, sparse):
        loaded, _ = load_data(dense, lambda: tokenizer, data, seq_len=seq_len,
            num_samples=num_samples, batch_size=batch_size, seed=seed, split=split,
            causal=False)  # fmt: skip
        samples: list[SampleDrift] = []
        with progress_bar(len(loaded.batches), "Explanations") as bar:
            for batch in loaded.batches:
                samples += _drift(dense, sparse, batch, top, times_input)
                bar.update()
    if not samples:
        raise EvaluationError("no sample has two tokens: there is no order to compare")
    return ExplanationDrift(tuple(samples), top, times_input, loaded.record)


def _drift(
    dense: nn.Module, sparse: nn.Module, batch: Batch, top: int, times_input: bool
) -> list[SampleDrift]:
    """Of the samples of a batch that have two tokens or more."""
    mask = token_mask(batch)
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = places.masked_fill(~mask, -1).amax(dim=1)
    ours, predicted = attributions(dense, to_device(batch, dense), last, None, times_input)
    target = predicted.argmax(-1)
    theirs, found = attributions(sparse, to_device(batch, sparse), last, target, times_input)
    if found.shape != predicted.shape:
        raise EvaluationError(
            f"the dense model has {predicted.shape[1]} classes and the sparse one "
            f"{found.shape[1]}: pass the model that it was made from"
        )
    same = (target.cpu() == found.argmax(-1).cpu()).tolist()
    return _compared(ours.cpu(), theirs.cpu(), mask, top, same)


def _compared(
    ours: Tensor, theirs: Tensor, mask: Tensor, top: int, same: Sequence[bool]
) -> list[SampleDrift]:
    found = []
    for a, b, keep, alike in zip(ours, theirs, mask.cpu(), same, strict=True):
        a, b = a[keep], b[keep]
        if len(a) < 2:
            continue
        count = min(top, len(a))
        largest = [set(x.abs().topk(count).indices.tolist()) for x in (a, b)]
        overlap = len(largest[0] & largest[1]) / count
        found.append(SampleDrift(len(a), rank_correlation(a, b), overlap, alike))
    return found
