"""Pairs that aren't selected count for nothing."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ....core.attention_settings import AttentionSettings
from ..base import Residual
from ..inputs import Inputs, Part


class NoResidual(Residual):
    """Sparse attention alone."""

    name: ClassVar[str] = "nothing"

    def __init__(self, inputs: Inputs, settings: AttentionSettings) -> None:
        pass

    def part(self, rest: Tensor) -> Part | None:
        return None

    def scores(self, rows: Tensor, keys: Tensor) -> Tensor | None:
        return None
