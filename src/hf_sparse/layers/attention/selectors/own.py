"""A query's own block alone, and what else it sees in part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ....core.attention_settings import AttentionSettings
from ..base import Selection, Selector
from ..inputs import Inputs


def best_blocks(inputs: Inputs, scores: Tensor, most: int) -> Tensor:
    """The blocks that are seen in part, then those with the highest scores.

    Args:
        inputs: of the call.
        scores: of key blocks, -inf for those that are out of question; (streams, query blocks, key
            blocks).
        most: blocks for each query block, unless more are seen in part.

    Returns:
        Their indices, -1 behind the last.
    """
    scores = scores.masked_fill(~inputs.whole, -torch.inf).masked_fill(inputs.part, torch.inf)
    most = max(most, int(inputs.part.sum(dim=2).max()))
    found, blocks = scores.topk(min(most, inputs.key_blocks), dim=2)
    return blocks.masked_fill(found == -torch.inf, -1)


class OwnSelector(Selector):
    """What can't be left to a residual."""

    name: ClassVar[str] = "own"

    def select(
        self, inputs: Inputs, settings: AttentionSettings, learned: Mapping[str, Tensor]
    ) -> Selection:
        return Selection(
            best_blocks(inputs, inputs.near.masked_fill(inputs.near < 2, -torch.inf), 1)
        )
