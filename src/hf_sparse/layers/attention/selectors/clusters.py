"""Rows and keys put together: as many of each in every cluster, since shapes have to be equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ....core.attention_settings import AttentionSettings
from ..base import Clusters, Selection, Selector
from ..inputs import Inputs
from .own import best_blocks


def nearby(inputs: Inputs, settings: AttentionSettings) -> Tensor:
    """Blocks for half of the keys that a query may have: what it sees in part, and neighbours."""
    most = max(1, settings.keys // 2 // inputs.size)
    return best_blocks(inputs, inputs.near.masked_fill(inputs.near == 0, -torch.inf), most)


def by_order(query_order: Tensor, key_order: Tensor, width: int) -> Clusters:
    """Cut orders of rows (streams, rounds, rows) and of keys (streams, rounds, keys) into as many
    pieces each, of about `width` keys; what doesn't fill a piece is in none."""
    keys = key_order.shape[-1]
    count = max(1, keys // min(width, keys))
    return Clusters(_pieces(query_order, count), _pieces(key_order, count))


def _pieces(order: Tensor, count: int) -> Tensor:
    """(streams, rounds, n) as (streams, rounds * count, n // count)."""
    length = order.shape[-1] // count
    return order[..., : length * count].reshape(len(order), -1, length)


def by_affinity(queries: Tensor, keys: Tensor, valid: Tensor, width: int) -> Clusters:
    """For each centre the rows and the keys that are nearest to it.

    Args:
        queries: of rows to centres; (streams, rows, centres).
        keys: of keys to centres; (streams, keys, centres).
        valid: keys that are no padding; (streams, keys).
        width: keys in a cluster; rows are as many more as there are more of them.
    """
    width = min(width, keys.shape[1])
    rows = min(queries.shape[1], max(1, width * queries.shape[1] // keys.shape[1]))
    keys = keys.masked_fill(~valid[..., None], -torch.inf)
    return Clusters(queries.mT.topk(rows, dim=-1).indices, keys.mT.topk(width, dim=-1).indices)


class CentresSelector(Selector):
    """Nearby blocks, and clusters around unit vectors that a layer has learned: "centres", (key
    heads, centres, channels). Half of `keys` are a cluster's."""

    learns: ClassVar[bool] = True

    def select(
        self, inputs: Inputs, settings: AttentionSettings, learned: Mapping[str, Tensor]
    ) -> Selection:
        centres = learned["centres"].to(inputs.keys).repeat(inputs.mask.batch_size, 1, 1).mT
        width = max(1, settings.keys // 2)
        count = min(centres.shape[-1], max(1, -(-inputs.keys.shape[1] // width)))
        with torch.no_grad():
            queries, keys = (
                torch.nn.functional.normalize(vectors, dim=-1) @ centres[..., :count]
                for vectors in (inputs.queries, inputs.keys)
            )
            found = by_affinity(queries, keys, inputs.valid, width)
        return Selection(nearby(inputs, settings), found)
