"""One call of an attention as selectors and residuals see it, and parts of its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.attention_settings import AttentionSettings
from .masks import LazyMask


@dataclass(frozen=True)
class Inputs:
    """Queries, keys and values of one attention, by streams: a stream is a key head of a sample.

    The query heads that share a key head are interleaved: row r of a stream is query r // groups.

    Attributes:
        queries: scaled, so that a score is a plain product; (streams, queries * groups, channels).
        keys, values: filled up with zeros to whole blocks; (streams, keys, channels).
        groups: query heads to a key head.
        mask: who sees what.
        step: queries of a block.
        size: keys of a block.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    groups: int
    mask: LazyMask
    step: int
    size: int

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: LazyMask,
        scaling: float,
        settings: AttentionSettings,
    ) -> Inputs:
        """From transformers' layout, (batch, heads, tokens, channels).

        On a CPU sums are in fp32: its products of half precision are slow without their own
        instructions.
        """
        if query.device.type == "cpu":
            query, key, value = query.float(), key.float(), value.float()
        batch, heads, length, channels = query.shape
        groups = heads // key.shape[1]
        rows = query.reshape(batch, key.shape[1], groups, length, channels).transpose(2, 3)
        fill = (0, 0, 0, -key.shape[2] % settings.key_block)
        return cls(
            (rows * scaling).reshape(-1, length * groups, channels),
            F.pad(key, fill).flatten(0, 1).contiguous(),
            F.pad(value, fill).flatten(0, 1).contiguous(),
            groups,
            mask,
            settings.block,
            settings.key_block,
        )

    @property
    def streams(self) -> int:
        return self.queries.shape[0]

    @property
    def heads(self) -> int:
        """Key heads."""
        return self.streams // self.mask.batch_size

    @property
    def query_blocks(self) -> int:
        return self.whole.shape[1]

    @property
    def key_blocks(self) -> int:
        return self.whole.shape[2]

    @cached_property
    def whole(self) -> Tensor:
        """Blocks that see each other wholly; (streams, query blocks, key blocks)."""
        return self._by_stream(self.mask.view(self.step, self.size).whole)

    @cached_property
    def part(self) -> Tensor:
        """Blocks that see each other in part; likewise."""
        return self._by_stream(self.mask.view(self.step, self.size).part)

    @cached_property
    def near(self) -> Tensor:
        """How near they are, from 2 to 0; likewise."""
        return self._by_stream(self.mask.view(self.step, self.size).near)

    @cached_property
    def valid(self) -> Tensor:
        """Keys that are no padding; (streams, keys)."""
        return self._by_stream(self.mask.view(self.step, self.size).valid)

    @cached_property
    def counts(self) -> Tensor:
        """Valid keys of each block; (streams, key blocks)."""
        return self._by_stream(self.mask.view(self.step, self.size).counts)

    @cached_property
    def centroids(self) -> Tensor:
        """Mean of each block's valid keys; (streams, key blocks, channels)."""
        return self.block_means(self.keys)

    @cached_property
    def batch(self) -> Tensor:
        """The sample of each stream; (streams,)."""
        return torch.arange(self.streams, device=self.keys.device) // self.heads

    def block_means(self, tensor: Tensor) -> Tensor:
        """Mean over each block's valid keys; (streams, key blocks, channels)."""
        if not bool(self.valid.all()):
            tensor = tensor * self.valid[..., None].to(tensor.dtype)
        sums = tensor.view(self.streams, self.key_blocks, self.size, -1).sum(dim=2)
        return sums / self.counts.clamp(min=1)[..., None].to(tensor.dtype)

    def rows(self, block: int) -> Tensor:
        """A block's queries; (streams, rows, channels)."""
        count = self.step * self.groups
        return self.queries[:, block * count : (block + 1) * count]

    def gather(self, tensor: Tensor, index: Tensor) -> Tensor:
        """Keys or values at indices of shape (streams, n); (streams, n, channels)."""
        start = torch.arange(self.streams, device=index.device)[:, None] * tensor.shape[1]
        flat = tensor.flatten(0, 1).index_select(0, (index + start).flatten())
        return flat.view(*index.shape, tensor.shape[-1])

    def _by_stream(self, tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(self.heads, dim=0)


@dataclass(frozen=True)
class Part:
    """Attention over some of the pairs: sums of exp(score) and of exp(score) times value.

    Attributes:
        shift: both sums are in units of exp(shift); (streams, rows).
        weight: sum over the pairs of exp(score); likewise.
        total: sum over the pairs of exp(score) value; (streams, rows, channels).
    """

    shift: Tensor
    weight: Tensor
    total: Tensor

    @classmethod
    def of(cls, scores: Tensor, values: Tensor, dropout: float = 0.0) -> Part:
        """From scores (streams, rows, n), -inf where a pair is none, and values.

        Scores are overwritten.
        """
        with torch.no_grad():  # what is divided out again
            shift = scores.amax(dim=-1).clamp(min=torch.finfo(scores.dtype).min)
        weights = scores.sub_(shift[..., None]).exp_()
        kept = F.dropout(weights, dropout) if dropout else weights
        total = torch.bmm(kept.to(values.dtype), values)
        return cls(shift, weights.sum(dim=-1), total.to(weights.dtype))

    @classmethod
    def of_all(cls, queries: Tensor, keys: Tensor, values: Tensor, dropout: float = 0.0) -> Part:
        """Of queries (streams, rows, channels) over all of their streams' keys.

        Where nothing needs a gradient by torch's kernel that holds no scores, which takes half of
        the time on a CPU: the sum of weights that it gives has none.
        """
        given = (queries, keys, values)
        trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        if queries.is_cpu and keys.shape == values.shape and not trains and not dropout:
            mean, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(tensor[:, None] for tensor in given), scale=1.0
            )
            shift = weight.view(queries.shape[:2])
            return cls(shift, torch.ones_like(shift), mean.view(queries.shape))
        return cls.of(torch.bmm(queries, keys.mT).float(), values, dropout)

    @classmethod
    def cat(cls, parts: Sequence[Part]) -> Part:
        """Those of consecutive rows in a row."""
        return cls(
            torch.cat([part.shift for part in parts], dim=1),
            torch.cat([part.weight for part in parts], dim=1),
            torch.cat([part.total for part in parts], dim=1),
        )

    def __add__(self, other: Part) -> Part:
        """Over the pairs of both."""
        shift = torch.maximum(self.shift, other.shift)
        own, its = (self.shift - shift).exp(), (other.shift - shift).exp()
        return Part(
            shift,
            self.weight * own + other.weight * its,
            self.total * own[..., None] + other.total * its[..., None],
        )

    def __sub__(self, other: Part) -> Part:
        """Without pairs that are in it."""
        return self + Part(other.shift, -other.weight, -other.total)

    def replaced(self, streams: Tensor, rows: Tensor, part: Part) -> Part:
        """With other sums in some rows."""
        place = (streams, rows)
        return Part(
            self.shift.index_put(place, part.shift),
            self.weight.index_put(place, part.weight),
            self.total.index_put(place, part.total),
        )

    def mean(self) -> Tensor:
        """The weighted mean of the values; zero where a row has no pair."""
        return self.total / self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny)[..., None]


def ends(seen: Tensor) -> list[int]:
    """For each query block, the number of key blocks up to the last one that any stream sees."""
    numbers = torch.arange(1, seen.shape[2] + 1, device=seen.device)
    found: list[int] = (seen.any(dim=0) * numbers).amax(dim=-1).tolist()
    return found
