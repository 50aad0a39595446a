"""How much calibration data a run will have."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..config.sparse_config import SparseConfig
from ..core.errors import CalibrationError
from .batches import CalibrationData
from .load import LONGEST_SEQUENCE, limits, load_calibration
from .sources import is_at_hand
from .tokenizers import load_tokenizer


@dataclass(frozen=True)
class ExpectedData:
    """What there is, or will be.

    Attributes:
        batches: how many.
        tokens: of all samples, with padding.
    """

    batches: int
    tokens: int

    @classmethod
    def of(cls, model: nn.Module, config: SparseConfig) -> ExpectedData:
        """Before a run: counted in data that are at hand, if they need no tokenizer or there is
        one; else as much as was asked for.

        Raises:
            ConfigError, CalibrationError: the data at hand are unusable.
        """
        if config.dataset is not None and is_at_hand(config.dataset):
            try:
                return cls.in_data(
                    load_calibration(model, config, lambda: _tokenizer(model, config)),
                    model,
                    config,
                )
            except _NoTokenizerError:
                pass
        return cls._asked(model, config) if config.dataset is not None else cls(0, 0)

    @classmethod
    def in_data(
        cls, data: CalibrationData | None, model: nn.Module, config: SparseConfig
    ) -> ExpectedData:
        """Of data that were loaded for a model."""
        batches = data.batches if data is not None else ()
        if all("input_ids" in batch for batch in batches):
            return cls(len(batches), sum(batch["input_ids"].numel() for batch in batches))
        return cls(len(batches), cls._asked(model, config).tokens)  # images and the like

    @classmethod
    def _asked(cls, model: nn.Module, config: SparseConfig) -> ExpectedData:
        longest, _ = limits(model)
        seq_len = config.seq_len or min(LONGEST_SEQUENCE, longest or LONGEST_SEQUENCE)
        return cls(-(-config.num_samples // config.batch_size), config.num_samples * seq_len)


class _NoTokenizerError(Exception):
    pass


def _tokenizer(model: nn.Module, config: SparseConfig) -> object:
    try:
        found = load_tokenizer(config.tokenizer, model)
    except CalibrationError:
        found = None
    if found is None:
        raise _NoTokenizerError
    return found
