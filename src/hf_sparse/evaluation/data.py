"""Evaluation data: what users pass for calibration, read by the same rules, but in full."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch, CalibrationData, make_batches
from ..calibration.load import LONGEST_SEQUENCE, limits
from ..core.errors import EvaluationError
from ..core.evaluation_mode import evaluation_mode
from ..core.untrusted_text import brief
from ..core.whole_number import whole_number


def load_data(
    model: nn.Module,
    load_tokenizer: Callable[[], Any],
    data: Any,
    *,
    seq_len: int | None,
    num_samples: int | None,
    batch_size: int,
    seed: int,
    split: str,
    join_documents: bool = False,
    causal: bool = True,
) -> tuple[CalibrationData, int]:
    """The batches to evaluate on, and the sequence length that holds.

    Args:
        model: tells the longest sequence and the vocabulary.
        load_tokenizer: gives a tokenizer; only called if the data are text.
        data: as `SparseConfig.dataset`.
        seq_len: tokens a sample; None for min(2048, what the model allows).
        num_samples: samples wanted; None for all.
        batch_size: samples per batch.
        seed: order in which documents of a file are drawn.
        split: of a data set that is named by its Hub id, or of a `DatasetDict`.
        join_documents: cut one stream of all texts, joined by blank lines.
        causal: must the model predict the next token?

    Raises:
        EvaluationError: a number is out of range, or the model can't take it.
        CalibrationError: the data are unusable; see `make_batches`.
    """
    if causal:
        check_causal(model)
    longest, vocab_size = limits(model)
    check_positive(seq_len=seq_len, num_samples=num_samples, batch_size=batch_size)
    for name, value in {"batch_size": batch_size, "seed": seed}.items():
        if whole_number(value) is None:
            raise EvaluationError(f"{name}={brief(value)} must be an integer")
    seq_len = seq_len or min(LONGEST_SEQUENCE, longest or LONGEST_SEQUENCE)
    if seq_len < 2 or (longest is not None and seq_len > longest):
        raise EvaluationError(
            f"seq_len={seq_len} must be at least 2 and at most the {longest} positions of the model"
        )
    loaded = make_batches(
        data,
        load_tokenizer,
        num_samples=num_samples or sys.maxsize,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        vocab_size=vocab_size,
        split=split,
        join_documents=join_documents,
    )
    if not all("input_ids" in batch for batch in loaded.batches):
        raise EvaluationError("the evaluation data have no input_ids: pass text or token ids")
    return loaded, seq_len


def check_positive(**values: int | None) -> None:
    """Raise an EvaluationError that names the first value below 1, or no integer; None is fine."""
    for name, value in values.items():
        if value is not None and (whole_number(value) or 0) < 1:
            raise EvaluationError(f"{name}={brief(value)} must be an integer of at least 1")


def predicts_next(model: nn.Module) -> bool:
    """Is what a model says at a token about the next one of its own inputs?"""
    causal = bool(getattr(model, "can_generate", bool)())
    return causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def check_causal(model: nn.Module) -> None:
    """Raise an EvaluationError unless the model predicts the next token."""
    if not predicts_next(model):
        raise EvaluationError(
            f"{type(model).__name__} is no causal language model: load it with AutoModelForCausalLM"
        )


def to_device(batch: Batch, model: nn.Module) -> Batch:
    """A batch where the model's inputs belong."""
    device: Any = model.device
    return {key: tensor.to(device) for key, tensor in batch.items()}


def token_mask(batch: Batch) -> Tensor:
    """True where `input_ids` holds a token, False at padding; (batch, tokens)."""
    ids = batch["input_ids"]
    return batch.get("attention_mask", torch.ones_like(ids)).bool()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """No gradients and no dropout; the models' modes are restored."""
    with evaluation_mode(*models), torch.no_grad():
        yield
