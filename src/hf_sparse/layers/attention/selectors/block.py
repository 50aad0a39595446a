"""The key blocks that matter to a block of queries: own, neighbours, first, and the heaviest.

A block's weight is what the softmax over centroids gives it, q c + log |block|, on average over
the queries. Streams are key heads: query heads that share keys share their blocks, so that these
are gathered once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ....core.attention_settings import AttentionSettings
from ..base import Selection, Selector
from ..inputs import Inputs, ends
from .own import best_blocks


class BlockSelector(Selector):
    """Key blocks by their centroids."""

    name: ClassVar[str] = "block"

    def select(
        self, inputs: Inputs, settings: AttentionSettings, learned: Mapping[str, Tensor]
    ) -> Selection:
        most = max(1, settings.keys // inputs.size)
        with torch.no_grad():
            return Selection(best_blocks(inputs, self._weights(inputs), most))

    def _weights(self, inputs: Inputs) -> Tensor:
        """Shares of attention of key blocks, more than 1 for near ones; (streams, query blocks,
        key blocks)."""
        weights = inputs.near.clone()
        centroids, sizes = inputs.centroids.mT, inputs.counts.float().log()[:, None]
        for i, seen in enumerate(ends(inputs.whole)):
            if seen == 0:
                continue
            scores = torch.bmm(inputs.rows(i), centroids[..., :seen]).float() + sizes[..., :seen]
            scores.masked_fill_(~inputs.whole[:, i, None, :seen], -torch.inf)
            weights[:, i, :seen] += scores.softmax(dim=-1).nan_to_num().mean(dim=1)
        return weights
