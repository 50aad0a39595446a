"""How much calibration data a run will have, told before files are read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..config.sparse_config import SparseConfig
from .batches import make_batches
from .load import LONGEST_SEQUENCE, limits
from .sources import all_numbers


@dataclass(frozen=True)
class ExpectedData:
    """What `load_calibration` will give.

    Attributes:
        batches: how many.
        tokens: of all samples, with padding.
    """

    batches: int
    tokens: int

    @classmethod
    def of(cls, model: nn.Module, config: SparseConfig) -> ExpectedData:
        """Counted where token ids or model inputs are at hand; else, as for a file or for texts, as
        much as was asked for.

        Raises:
            CalibrationError: the data at hand are unusable.
        """
        if config.dataset is None:
            return cls(0, 0)
        longest, _ = limits(model)
        seq_len = config.seq_len or min(LONGEST_SEQUENCE, longest or LONGEST_SEQUENCE)
        asked = cls(-(-config.num_samples // config.batch_size), config.num_samples * seq_len)
        if not all_numbers(config.dataset):
            return asked
        batches = make_batches(
            config.dataset,
            lambda: None,
            num_samples=config.num_samples,
            seq_len=seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            vocab_size=None,
        ).batches
        if not all("input_ids" in batch for batch in batches):
            return cls(len(batches), asked.tokens)  # of images and the like models make tokens
        return cls(len(batches), sum(batch["input_ids"].numel() for batch in batches))
