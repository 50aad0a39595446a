"""Calibration data for a model: the config's data as batches, checked against what it can take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from ..config.sparse_config import SparseConfig
from ..core.errors import CalibrationError, ConfigError
from ..core.logging import get_logger
from .batches import CalibrationData, make_batches

logger = get_logger(__name__)

# Of the default for seq_len; the papers calibrate with 2048 tokens.
LONGEST_SEQUENCE = 2048

# What a config calls the number of its positions. A text is the input of encoder and decoder both.
POSITIONS = (
    "max_position_embeddings",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
)


def load_calibration(
    model: nn.Module, config: SparseConfig, load_tokenizer: Callable[[], Any]
) -> CalibrationData | None:
    """The config's data as batches for the model; None if it has none.

    Raises:
        ConfigError, CalibrationError: the data are unusable, or too long for the model.
    """
    if config.dataset is None:
        return None
    longest, vocab_size = limits(model)
    if config.seq_len is not None and longest is not None and config.seq_len > longest:
        raise ConfigError(
            f"seq_len={config.seq_len} is longer than the {longest} positions that the model has"
        )
    data = make_batches(
        config.dataset,
        load_tokenizer,
        num_samples=config.num_samples,
        seq_len=config.seq_len or min(LONGEST_SEQUENCE, longest or LONGEST_SEQUENCE),
        batch_size=config.batch_size,
        seed=config.seed,
        vocab_size=vocab_size,
        join_documents=config.join_documents,
        keep_labels=getattr(getattr(model, "config", None), "is_encoder_decoder", False),
    )
    if data.record.count is not None and data.record.count < config.num_samples:
        logger.warning(
            "the calibration data gave %d samples, fewer than num_samples=%d",
            data.record.count,
            config.num_samples,
        )
    if config.target == "dense":
        _check_room(model, data)
    return data


def _check_room(model: nn.Module, data: CalibrationData) -> None:
    """Raise a CalibrationError if two sets of hidden states are more than the free memory."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(text, "hidden_size", None)
    if not isinstance(width, int):
        return
    tokens = sum(batch["input_ids"].numel() for batch in data.batches if "input_ids" in batch)
    dtype = getattr(model, "dtype", None) or torch.float32
    needed, free = 2 * tokens * width * dtype.itemsize, psutil.virtual_memory().available
    if needed > free:
        raise CalibrationError(
            f"target='dense' holds two sets of hidden states, {needed / 1e9:.1f} GB for {tokens} "
            f"calibration tokens of {width} numbers, and {free / 1e9:.1f} GB of memory are free: "
            f"lower num_samples or seq_len to {int(tokens * free / needed)} tokens in all, or pass "
            "target='layer', which holds one set"
        )


def limits(model: nn.Module) -> tuple[int | None, int | None]:
    """Positions and vocabulary that the model's config and embeddings tell of."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [getattr(text, name, None) for name in POSITIONS]
    longest = min((n for n in found if isinstance(n, int) and n > 0), default=None)
    embedding = None
    if hasattr(model, "get_input_embeddings"):
        try:
            embedding = model.get_input_embeddings()  # type: ignore[operator]
        except NotImplementedError:
            embedding = None
    vocab = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None
    if longest is None:
        return None, vocab
    return longest - _unused_positions(model, longest), vocab


def _unused_positions(model: nn.Module, rows: int) -> int:
    """How many of a position embedding's rows no token ever has.

    In a table with a row for padding (RoBERTa and what came of it) the first token has the row
    behind that one.
    """
    unused = [0]
    for name, module in model.named_modules():
        padding, weight = getattr(module, "padding_idx", None), getattr(module, "weight", None)
        if "position" in name.rpartition(".")[2] and padding is not None and weight is not None:
            unused.append(padding + 1 if weight.shape[0] == rows else 0)
    return max(unused)
