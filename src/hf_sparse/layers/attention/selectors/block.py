"""The keys that matter to a block of queries: its own and its neighbours', the first, the heaviest.

Some of the queries are asked: what their exact attention gives to each block of keys, on average,
is its weight. It costs as much of the attention's scores as the share of queries that are asked,
and finds most of what all of them would, where means of keys find little: rotary positions turn
neighbouring keys away from each other. Fewer queries miss the keys of heads that look for one token
each. Streams are key heads: query heads that share keys share
their blocks, so that these are gathered once.
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

ASKED = 16  # queries of a block


class BlockSelector(Selector):
    """Key blocks by the attention of a sample of the queries."""

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
        every = max(1, inputs.step // ASKED)
        for i, seen in enumerate(ends(inputs.whole)):
            if seen == 0:
                continue
            rows = inputs.rows(i)
            asked = rows.view(len(rows), -1, inputs.groups, rows.shape[-1])[:, ::every]
            keys = inputs.keys[:, : seen * inputs.size]
            scores = torch.bmm(asked.flatten(1, 2), keys.mT)
            hidden = ~inputs.whole[:, i, :seen].repeat_interleave(inputs.size, 1)
            hidden |= ~inputs.valid[:, : seen * inputs.size]
            if bool(hidden.any()):
                scores.masked_fill_(hidden[:, None], -torch.inf)
            shares = scores.softmax(dim=-1)
            if bool(hidden.all(dim=1).any()):
                shares = shares.nan_to_num()
            weights[:, i, :seen] += shares.mean(dim=1).view(-1, seen, inputs.size).sum(dim=-1)
        return weights
