"""FAVOR+ of Performers (Choromanski et al. 2021, equation 5; orthogonal features, section 2.4).

With w drawn from a normal distribution, exp(q k) is the mean of phi(q) phi(k) with
phi(x) = exp(w x - |x|^2 / 2). The features of a block's keys are summed once, so that a pair of
blocks costs as much as one key.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ....core.attention_settings import AttentionSettings
from ..base import Residual
from ..inputs import Inputs, Part


class FavorResidual(Residual):
    """Random features."""

    name: ClassVar[str] = "favor"

    def __init__(self, inputs: Inputs, settings: AttentionSettings) -> None:
        self._inputs = inputs
        # Scores are plain products here: both sides get the same share of their scale.
        balance = (_norm(inputs.keys) / _norm(inputs.queries)).sqrt()
        directions = _orthogonal(inputs.keys.shape[-1], settings.features, settings.seed)
        directions = directions.to(inputs.keys)
        queries = _log_features(inputs.queries * balance, directions)
        keys = _log_features(inputs.keys / balance, directions)
        keys = keys.masked_fill(~inputs.valid[..., None], -math.inf)
        self._query_shift = queries.amax(dim=-1, keepdim=True)
        self._key_shift = keys.amax(dim=(1, 2), keepdim=True)
        self._queries = (queries - self._query_shift).exp()
        self._keys = (keys - self._key_shift).exp()
        self._shift = (self._query_shift + self._key_shift)[..., 0] - math.log(settings.features)

    def part(self, rest: Tensor) -> Part | None:
        inputs = self._inputs
        blocks = (inputs.streams, inputs.key_blocks, inputs.size, -1)
        keys, values = self._keys.view(blocks), inputs.values.view(blocks)
        sums, products = keys.sum(dim=2), keys.mT @ values
        weights, totals = [], []
        step = inputs.step * inputs.groups
        for i in range(inputs.query_blocks):
            rows = self._queries[:, i * step : (i + 1) * step]
            seen = rest[:, i, :, None].to(sums.dtype)
            weights.append((rows @ (sums * seen).sum(dim=1)[..., None])[..., 0])
            totals.append(rows @ (products * seen[..., None]).sum(dim=1))
        return Part(self._shift, torch.cat(weights, dim=1), torch.cat(totals, dim=1))

    def scores(self, rows: Tensor, keys: Tensor) -> Tensor | None:
        inputs = self._inputs
        streams = torch.arange(inputs.streams, device=rows.device)[:, None]
        products = self._queries[streams, rows] @ inputs.gather(self._keys, keys).mT
        smallest = torch.finfo(products.dtype).tiny
        return products.clamp(min=smallest).log() + self._shift[streams, rows][..., None]


def _norm(vectors: Tensor) -> Tensor:
    """Mean length in each stream; (streams, 1, 1)."""
    norms: Tensor = vectors.norm(dim=-1).mean(dim=-1)
    return norms.clamp(min=torch.finfo(vectors.dtype).eps)[:, None, None]


def _log_features(vectors: Tensor, directions: Tensor) -> Tensor:
    logs: Tensor = vectors @ directions.T - vectors.square().sum(dim=-1, keepdim=True) / 2
    return logs


def _orthogonal(channels: int, features: int, seed: int) -> Tensor:
    """Directions as long as normal vectors, orthogonal to each other by `channels` at a time."""
    generator = torch.Generator().manual_seed(seed)
    count = -(-features // channels)
    normal = torch.randn(count, channels, channels, generator=generator)
    lengths = torch.randn(features, channels, generator=generator).norm(dim=-1, keepdim=True)
    bases, upper = torch.linalg.qr(normal)
    # Its signs are LAPACK's otherwise, and directions not evenly spread.
    bases = bases * upper.diagonal(dim1=1, dim2=2).sign()[:, None]
    directions: Tensor = bases.flatten(0, 1)[:features] * lengths
    return directions
