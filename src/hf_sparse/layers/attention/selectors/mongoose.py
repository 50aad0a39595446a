"""MONGOOSE (Chen et al. 2021): hash directions by which queries meet the keys they attend to.

The triplet loss of its section 3.2, max(0, |q - k+| - |q - k-| + margin) on unit vectors, taken of
their projections: k+ is the key with a query's largest score, k- one drawn at random. Directions
are learned beforehand, from calibration data; the paper's scheduler, which learns on while a model
trains, has nothing to do here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.attention_settings import AttentionSettings
from .clusters import CentresSelector

DIRECTIONS, STEPS, RATE, MARGIN = 64, 200, 0.02, 1.0


class MongooseSelector(CentresSelector):
    """Clusters by learned directions."""

    name: ClassVar[str] = "mongoose"

    def learn(
        self, queries: Tensor, keys: Tensor, settings: AttentionSettings
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(settings.seed)
        heads, samples, channels = keys.shape
        best = (queries.float() @ keys.float().mT).argmax(dim=-1)
        unit_queries, unit_keys = (F.normalize(x.float(), dim=-1) for x in (queries, keys))
        start = torch.randn(heads, DIRECTIONS, channels, generator=generator).to(unit_keys)
        directions = F.normalize(start, dim=-1).requires_grad_()
        optimizer = torch.optim.Adam([directions], RATE)
        streams = torch.arange(heads, device=keys.device)[:, None]
        with torch.enable_grad():
            for _ in range(STEPS):
                other = torch.randint(samples, best.shape, generator=generator).to(best.device)
                hashes = F.normalize(directions, dim=-1).mT
                query, key = unit_queries @ hashes, unit_keys @ hashes
                near = (query - key[streams, best]).norm(dim=-1)
                far = (query - key[streams, other]).norm(dim=-1)
                loss = (near - far + MARGIN).clamp(min=0).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {"centres": F.normalize(directions.detach(), dim=-1)}
