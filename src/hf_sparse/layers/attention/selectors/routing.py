"""Routing (Roy et al. 2021): clusters of queries and keys around centroids, learned beforehand.

The centroids are those of spherical k-means over a layer's queries and keys; each takes the rows
and keys that are nearest to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.attention_settings import AttentionSettings
from ..base import Selection, Selector
from ..inputs import Inputs
from .clusters import with_centres

CENTRES, STEPS = 64, 10


class RoutingSelector(Selector):
    """Clusters by centroids of a layer's queries and keys."""

    name: ClassVar[str] = "routing"
    learns: ClassVar[bool] = True

    def select(
        self, inputs: Inputs, settings: AttentionSettings, learned: Mapping[str, Tensor]
    ) -> Selection:
        return with_centres(inputs, settings, learned["centres"])

    def learn(
        self, queries: Tensor, keys: Tensor, settings: AttentionSettings
    ) -> dict[str, Tensor]:
        vectors = F.normalize(torch.cat([queries, keys], dim=1).float(), dim=-1)
        generator = torch.Generator().manual_seed(settings.seed)
        chosen = torch.randperm(vectors.shape[1], generator=generator)[:CENTRES]
        centres = vectors[:, chosen.to(vectors.device)]
        for _ in range(STEPS):
            nearest = (vectors @ centres.mT).argmax(dim=-1)
            sums = torch.zeros_like(centres).scatter_add_(
                1, nearest[..., None].expand_as(vectors), vectors
            )
            empty = sums.norm(dim=-1, keepdim=True) == 0
            centres = F.normalize(sums.where(~empty, centres), dim=-1)
        return {"centres": centres}
