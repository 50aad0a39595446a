"""Each block as if all its keys and values were their means: exp(q c + log |block|) times one.

Low rank by blocks, the counterpart of a sparse part as in Scatterbrain (Chen et al. 2021).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ....core.attention_settings import AttentionSettings
from ..base import Residual
from ..inputs import Inputs, Part, ends


class CentroidResidual(Residual):
    """Blocks by their centroids."""

    name: ClassVar[str] = "centroids"

    def __init__(self, inputs: Inputs, settings: AttentionSettings) -> None:
        self._inputs = inputs

    def part(self, rest: Tensor) -> Part | None:
        if not bool(rest.any()):
            return None
        inputs = self._inputs
        means = inputs.block_means(inputs.values)
        sizes = inputs.counts.float().log()[:, None]
        parts = []
        for i, last in enumerate(ends(rest)):
            seen = max(1, last)
            centroids = inputs.centroids[:, :seen]
            scores = torch.bmm(inputs.rows(i), centroids.mT).float() + sizes[..., :seen]
            scores.masked_fill_(~rest[:, i, None, :seen], -torch.inf)
            parts.append(Part.of(scores, means[:, :seen]))
        return Part.cat(parts)

    def scores(self, rows: Tensor, keys: Tensor) -> Tensor | None:
        inputs = self._inputs
        streams = torch.arange(inputs.streams, device=rows.device)[:, None]
        centroids = inputs.gather(inputs.centroids, keys // inputs.size)
        return torch.bmm(inputs.queries[streams, rows], centroids.mT)
