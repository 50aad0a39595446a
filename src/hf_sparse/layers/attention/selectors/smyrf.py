"""SMYRF (Daras et al. 2020): asymmetric hashing, and clusters of equal size by sorting the hashes.

Queries and keys get two more channels that make all of them equally long and leave their products
as they are (section 3.2); a hash is a random projection. Each of the rounds sorts by another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ....core.attention_settings import AttentionSettings
from ..base import Selection, Selector
from ..inputs import Inputs
from .clusters import by_order, nearby

ROUNDS = 2


class SmyrfSelector(Selector):
    """Clusters by random projections."""

    name: ClassVar[str] = "smyrf"

    def select(
        self, inputs: Inputs, settings: AttentionSettings, learned: Mapping[str, Tensor]
    ) -> Selection:
        with torch.no_grad():
            queries, keys = (self._hashes(inputs, settings.seed, of) for of in ("query", "key"))
            keys = keys.masked_fill(~inputs.valid[:, None], torch.inf)
            width = max(1, settings.keys // 2 // ROUNDS)
            clusters = by_order(queries.argsort(dim=-1), keys.argsort(dim=-1), width)
        return Selection(nearby(inputs, settings), clusters)

    def _hashes(self, inputs: Inputs, seed: int, of: str) -> Tensor:
        """(streams, rounds, rows or keys)."""
        lengths = [v.square().sum(dim=-1) for v in (inputs.queries, inputs.keys)]
        longest = sum(length.amax(dim=-1, keepdim=True) for length in lengths)
        vectors = inputs.queries if of == "query" else inputs.keys
        own = lengths[0] if of == "query" else lengths[1]
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(ROUNDS, vectors.shape[-1] + 2, generator=generator).to(vectors)
        fill = (longest - own).clamp(min=0).sqrt()
        extra = random[:, -2 if of == "query" else -1]
        return (vectors @ random[:, :-2].T).mT + extra[:, None] * fill[:, None]
