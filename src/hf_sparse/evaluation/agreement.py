"""How closely a model follows another one: its next-token distributions, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.data_record import DataRecord
from ..core.errors import EvaluationError
from ..core.logging import progress_bar
from ..core.renamed import renamed_arguments
from .data import evaluating, load_data, to_device, token_mask


@dataclass(frozen=True)
class Agreement:
    """What `agreement` measured.

    Attributes:
        kl_divergence: mean over all positions of KL(dense || sparse), in nats.
        top1: fraction of positions at which both models' most probable token is the same.
        tokens: number of positions.
        seq_len: longest sequence, in tokens.
        data: where the data came from, with their digest.
        depth: relative error of the hidden states, ||h - h'|| / ||h|| over all positions with h the
            dense model's: of the embeddings, then after each block, the last one after the final
            norm where transformers gives it so. Empty unless asked for.
    """

    kl_divergence: float
    top1: float
    tokens: int
    seq_len: int
    data: DataRecord
    depth: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"agreement with the dense model: KL divergence {self.kl_divergence:.4f} nats, same "
            f"most probable token at {self.top1:.2%} of {self.tokens} positions"
        )


@renamed_arguments(data="dataset")
def agreement(
    model: nn.Module,
    dense: nn.Module,
    tokenizer: Any,
    dataset: Any,
    seq_len: int | None = None,
    *,
    num_samples: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    split: str = "test",
    join_documents: bool = False,
    depth: bool = False,
) -> Agreement:
    """Compare the next-token distributions of a model with those of the one it was made from.

    At each position, also the last, KL(P || Q) = sum over v of P(v) log(P(v) / Q(v)) with P the
    dense model's softmax and Q the other's, both in fp32.

    Args:
        model: the sparse model.
        dense: the model to compare with; same vocabulary.
        tokenizer, dataset, seq_len, num_samples, batch_size, seed, split, join_documents: as for
            `perplexity`.
        depth: also compare the hidden states after every block; those of one batch are then in
            memory twice.

    Raises:
        EvaluationError: an argument is out of range, or the vocabularies differ.
        CalibrationError: the data are unusable.
    """
    loaded, seq_len = load_data(model, lambda: tokenizer, dataset, seq_len=seq_len,
        num_samples=num_samples, batch_size=batch_size, seed=seed, split=split,
        join_documents=join_documents)  # fmt: skip
    divergence, same, tokens = 0.0, 0, 0
    states: dict[str, Any] = {"output_hidden_states": True} if depth else {}
    deviation = _Deviation()
    with evaluating(model, dense), progress_bar(len(loaded.batches), "Agreement") as bar:
        for batch in loaded.batches:
            of_dense = dense(**to_device(batch, dense), use_cache=False, **states)
            of_model = model(**to_device(batch, model), use_cache=False, **states)
            if depth:
                deviation.add(of_dense.hidden_states, of_model.hidden_states, token_mask(batch))
            expected: Tensor = of_dense.logits
            found: Tensor = of_model.logits
            if expected.shape != found.shape:
                raise EvaluationError(
                    f"the models' vocabularies have {expected.shape[-1]} and {found.shape[-1]} "
                    "entries: compare a model with the one that it was made from"
                )
            # A sample at a time: logits in fp32 are the largest tensors here.
            for p, q, mask in zip(expected, found, token_mask(batch), strict=True):
                keep = mask.to(p.device)
                kl = kl_divergence(p[keep].float(), q.to(p.device)[keep].float())
                divergence += kl.sum(dtype=torch.float64).item()
                same += int((p[keep].argmax(-1) == q.to(p.device)[keep].argmax(-1)).sum())
                tokens += len(kl)
            bar.update()
    return Agreement(
        divergence / tokens,
        same / tokens,
        tokens,
        seq_len,
        loaded.record,
        deviation.relative(),
    )


class _Deviation:
    """Sums of squares of the hidden states of two models, and of their differences."""

    def __init__(self) -> None:
        self._differences: list[float] = []
        self._references: list[float] = []

    def add(self, expected: Sequence[Tensor], found: Sequence[Tensor], token_mask: Tensor) -> None:
        """Add a batch: (batch, tokens, hidden) after the embeddings and each block."""
        if not self._references:
            self._differences = [0.0] * len(expected)
            self._references = [0.0] * len(expected)
        for i, (h, other) in enumerate(zip(expected, found, strict=True)):
            keep = token_mask.to(h.device)
            difference = h[keep].float() - other.to(h.device)[keep].float()
            self._differences[i] += difference.square().sum(dtype=torch.float64).item()
            self._references[i] += h[keep].float().square().sum(dtype=torch.float64).item()

    def relative(self) -> tuple[float, ...]:
        pairs = zip(self._differences, self._references, strict=True)
        return tuple(math.sqrt(d / r) if r else 0.0 for d, r in pairs)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax p || softmax q) of each row; tokens that p rules out count nothing."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    probability = log_p.exp()
    return torch.where(probability > 0, probability * (log_p - log_q), 0.0).sum(-1)
