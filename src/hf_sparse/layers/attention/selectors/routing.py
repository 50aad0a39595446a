"""Routing (Roy et al. 2021): clusters of queries and keys around centroids, learned beforehand.

The centroids are those of spherical k-means over a layer's queries and keys; each takes the rows
and keys that are nearest to it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.attention_settings import AttentionSettings
from .clusters import CentresSelector

CENTRES, STEPS = 64, 10


class RoutingSelector(CentresSelector):
    """Clusters by centroids of a layer's queries and keys."""

    name: ClassVar[str] = "routing"

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
