"""Which query may attend to which key, evaluated where it is asked for.

transformers describes a mask by a function of batch, head, query and key, and makes a tensor of
queries times keys of it. Sparse attention needs it at the pairs that it looks at, and of all others
only which block of queries sees which block of keys. That is read off each block's first and last
key: whatever transformers' mask functions allow a query (causal, a window, a chunk, one of several
packed sequences, an image's tokens) are consecutive keys, but for padding, which is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

MaskFunction = Callable[[Any, Any, Any, Any], Tensor]


@dataclass(frozen=True)
class BlockView:
    """What each block of queries sees of each block of keys.

    Attributes:
        whole: each query that sees anything sees all of the keys; (batch, query blocks, key
            blocks).
        part: at least one query sees some of the keys, and not whole; likewise.
        near: 2 for a query block's own place, 1 for what is next to it, as much on either side, and
            for the first block that it sees, 0 for others; likewise.
        valid: keys that are no padding, filled up to whole blocks; (batch, keys).
        counts: valid keys; (batch, key blocks).
    """

    whole: Tensor
    part: Tensor
    near: Tensor
    valid: Tensor
    counts: Tensor


class LazyMask:
    """A mask that isn't made yet.

    Args:
        mask_function: of batch, head, query and key indices, which broadcast; True if allowed.
        batch_size, q_length, kv_length: of the attention.
        q_offset, kv_offset: indices of the first query and key in the mask function.
        attention_mask: True at keys that are no padding; (batch, keys), None for no padding.
        device: where indices are made.
        options: what else transformers gives its own masks.
    """

    def __init__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: MaskFunction = causal_mask_function,
        attention_mask: Tensor | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        self.batch_size, self.q_length, self.kv_length = batch_size, q_length, kv_length
        self.q_offset, self.kv_offset = q_offset, kv_offset
        self._function, self._attention_mask, self._device = mask_function, attention_mask, device
        self._options = options
        self._views: dict[tuple[int, int], BlockView] = {}

    @classmethod
    def plain(cls, query: Tensor, key: Tensor, causal: bool) -> LazyMask:
        """Of a model that makes no mask, for tensors of shape (batch, heads, tokens, channels)."""
        function = causal_mask_function if causal else bidirectional_mask_function
        return cls(
            query.shape[0], query.shape[2], key.shape[2],
            mask_function=function, device=query.device,
            allow_is_causal_skip=causal, allow_is_bidirectional_skip=not causal,
        )  # fmt: skip

    @property
    def causal(self) -> bool:
        """Does a `dense` of None stand for all keys before a query? Otherwise it does for all."""
        return not self._options.get("allow_is_bidirectional_skip", False)

    @cached_property
    def dense(self) -> Tensor | None:
        """What SDPA is given: (batch, 1, queries, keys), or None where `causal` says it all."""
        mask: Tensor | None = sdpa_mask(
            batch_size=self.batch_size,
            q_length=self.q_length,
            kv_length=self.kv_length,
            q_offset=self.q_offset,
            kv_offset=self.kv_offset,
            mask_function=self._function,
            attention_mask=self._attention_mask,
            device=self._device,
            **self._options,
        )
        return mask

    @cached_property
    def valid(self) -> Tensor:
        """True at keys that are no padding; (batch or 1, keys)."""
        padding: Tensor | None = prepare_padding_mask(
            self._attention_mask, self.kv_length, self.kv_offset
        )
        if padding is None:
            return torch.ones(1, self.kv_length, dtype=torch.bool, device=self._device)
        return padding[:, self.kv_offset : self.kv_offset + self.kv_length]

    def allowed(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """May a query attend to a key, padding apart?

        Args:
            batch, query, key: indices from 0 on, which broadcast.
        """
        head = torch.zeros((), dtype=torch.long, device=query.device)
        return self._function(batch, head, query + self.q_offset, key + self.kv_offset)

    def view(self, step: int, size: int) -> BlockView:
        """What blocks of `step` queries see of blocks of `size` keys; made once."""
        if (step, size) not in self._views:
            self._views[step, size] = self._look(step, size)
        return self._views[step, size]

    def _look(self, step: int, size: int) -> BlockView:
        blocks, rows = -(-self.kv_length // size), -(-self.q_length // step)
        valid = self.valid.expand(self.batch_size, -1)
        valid = torch.nn.functional.pad(valid, (0, blocks * size - self.kv_length))
        by_block = valid.view(-1, blocks, size)
        counts = by_block.sum(dim=-1)
        # Of a block of padding the first key, which nothing sees.
        start = torch.arange(blocks, device=valid.device) * size
        first = start + by_block.int().argmax(dim=-1)
        last = start + size - 1 - by_block.int().flip(-1).argmax(dim=-1)
        ends = torch.stack([first, torch.where(counts > 0, last, first)], dim=1)
        batch = torch.arange(self.batch_size, device=valid.device)[:, None, None]
        query = torch.arange(self.q_length, device=valid.device)[:, None]
        seen = [
            (self.allowed(batch, query, end[:, None]) & (counts > 0)[:, None]).expand(
                self.batch_size, self.q_length, blocks
            )
            for end in ends.unbind(1)
        ]
        some, every = seen[0] | seen[1], seen[0] & seen[1]
        alive = some.any(dim=-1, keepdim=True)
        whole = _by_rows(every | ~alive, step, True).all(dim=2)
        visible = _by_rows(some, step, False).any(dim=2)
        # A query's own neighbourhood may be seen in its middle alone.
        own = torch.arange(rows, device=valid.device)[:, None] * step + (
            self.q_offset - self.kv_offset
        )
        touches = (own < start + size) & (own + step > start)
        visible = visible | (touches & (counts > 0)[:, None])
        surely = _by_rows(every, step, True).all(dim=2)  # there "sees nothing" isn't known
        whole = whole & (surely | ~touches) & visible & (counts > 0)[:, None]
        beside = (own < start + size + step) & (own + 2 * step > start)
        leading = visible.int().argmax(dim=-1, keepdim=True) == torch.arange(
            blocks, device=valid.device
        )
        near = (visible & touches).float() + (visible & (beside | leading))
        return BlockView(whole, visible & ~whole, near, valid, counts)


def _by_rows(seen: Tensor, size: int, fill: bool) -> Tensor:
    """(batch, queries, key blocks) as (batch, query blocks, size, key blocks)."""
    queries = seen.shape[1]
    blocks = math.ceil(queries / size)
    padded = torch.nn.functional.pad(seen, (0, 0, 0, blocks * size - queries), value=fill)
    return padded.view(len(seen), blocks, size, -1)


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    use_vmap: bool = False,
    **kwargs: Any,
) -> LazyMask | Tensor | None:
    """The mask of a sparse attention, for transformers' `AttentionMaskInterface`.

    One query, a cache with room for tokens to come, a mask function that isn't made for indices
    that broadcast, and a compiler get the tensor that SDPA gets: attention is then exact.
    """
    causal = "allow_is_bidirectional_skip" not in kwargs
    if (
        isinstance(q_offset, Tensor)
        or (causal and q_offset + q_length < kv_offset + kv_length)
        or q_length == 1
        or use_vmap
        or torch.compiler.is_compiling()
    ):
        if causal and q_length > 1:  # None would stand for all keys of some modules
            kwargs["allow_is_causal_skip"] = False
        mask: Tensor | None = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, use_vmap=use_vmap, **kwargs,
        )  # fmt: skip
        return mask
    return LazyMask(batch_size, q_length, kv_length, q_offset, kv_offset, **kwargs)
