"""The attention implementations that transformers finds by name, and the mask that they are given.

Exact attention takes over for a few queries after many keys, for few keys, under a compiler, and
where a model makes its mask itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...core.attention_settings import METHODS, AttentionSettings
from ...core.errors import ConfigError
from ...kernels.operator import recorded
from .attend import attend
from .base import Residual, Selector
from .inputs import Inputs
from .masks import LazyMask, lazy_mask
from .residuals import RESIDUALS
from .selectors import SELECTORS

# The submodule of an attention that holds its settings and what was learned of it.
STATE = "sparse_attention"
# What changes scores in ways that no selector knows of, by the argument that says so.
UNSUPPORTED = {
    "position_bias": "position bias",
    "softcap": "soft caps",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "keys that it picks itself",
    "block_indices": "keys that it picks itself",
}
# Tensors that only say again what the mask says, or are about something else.
HARMLESS = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "image_grid_thw",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "position_ids",
    "seq_idx",
}

Observer = Callable[[nn.Module, Tensor, Tensor, Tensor, "LazyMask | Tensor | None", float], None]
_observers: list[Observer] = []


class AttentionState(nn.Module):
    """Settings of one attention, and tensors that its selector has learned.

    The tensors are no part of the model's state dict: exact attention knows nothing of them.

    Attributes:
        settings: the model's.
        heads, channels: of its keys.
    """

    def __init__(self, settings: AttentionSettings, heads: int, channels: int) -> None:
        super().__init__()
        self.settings, self.heads, self.channels = settings, heads, channels

    @property
    def learns(self) -> bool:
        """Does its selector need what `take` gets?"""
        return parts(self.settings)[0].learns

    def take(self, learned: Mapping[str, Tensor]) -> None:
        """Hold what was learned."""
        for name, tensor in learned.items():
            self.register_buffer(name, tensor, persistent=False)

    def learned(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(self.named_buffers())


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Attention is exact, and tells of each call: module, queries, keys and values in
    transformers' layout, mask, and what scores are multiplied by."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    method: str,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Sparse attention as transformers calls it.

    Args:
        module: the attention layer.
        query, key, value: (batch, heads, tokens, channels), of keys maybe fewer heads.
        attention_mask: from `lazy_mask`; a tensor that the model has made itself makes attention
            exact, and None stands for all keys, or all before the query.
        dropout: probability with which a weight counts as zero.
        scaling: what scores are multiplied by; channels ** -0.5 if None.
        is_causal: without a mask; the module's own if None.
        method: name of the implementation.

    Returns:
        (batch, tokens, heads, channels), and no weights.

    Raises:
        ConfigError: the model changes scores by position or size, or has a tensor or a number for
            its attention that is not known here; or the method needs what it has not learned.
    """
    for name, given in kwargs.items():
        what = UNSUPPORTED.get(name, f"an argument {name!r} of its own")
        unknown = isinstance(given, (Tensor, float)) and name not in HARMLESS
        if given is not None and (name in UNSUPPORTED or unknown):
            raise ConfigError(
                f"{type(module).__name__} has {what}, which {method!r} can't follow: load the "
                'model with attn_implementation="sdpa" or "eager"'
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    for observer in _observers:
        observer(module, query, key, value, attention_mask, scale)
    state = getattr(module, STATE, None)
    if state is not None and state.settings.method != method:
        state = None  # transformers was told of another one since
    settings = state.settings if state is not None else AttentionSettings(method)
    exact = bool(_observers) or torch.compiler.is_compiling() or recorded(query)
    exact = exact or query.shape[2] == 1 or key.shape[2] < settings.from_length
    # A few tokens after many, as assisted decoding checks them: what one at a time would have.
    exact = exact or query.shape[2] < min(settings.block, key.shape[2])
    if exact or isinstance(attention_mask, Tensor):
        mask = attention_mask
        if isinstance(attention_mask, LazyMask):  # it knows better than some modules' is_causal
            mask, is_causal = attention_mask.dense, attention_mask.causal
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal, **kwargs
        )
        return result
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        attention_mask = LazyMask.plain(query, key, bool(causal))
    elif attention_mask.kv_length != key.shape[2]:
        raise ConfigError(
            f"{type(module).__name__} has {key.shape[2]} keys where its mask has "
            f"{attention_mask.kv_length}, which {method!r} can't follow"
        )
    learned = state.learned() if state is not None else {}
    return sparse(query, key, value, attention_mask, scale, settings, learned, dropout), None


def states(model: nn.Module) -> dict[str, AttentionState]:
    """Those of a model's attention layers, by the layers' names."""
    found = {name: getattr(module, STATE, None) for name, module in model.named_modules()}
    return {name: state for name, state in found.items() if isinstance(state, AttentionState)}


def sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: LazyMask,
    scaling: float,
    settings: AttentionSettings,
    learned: dict[str, Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """Sparse attention whatever the length; (batch, tokens, heads, channels).

    Raises:
        ConfigError: the selector needs what it has not learned.
    """
    selector, residual = parts(settings)
    if selector.learns and not learned:
        raise ConfigError(
            f"selector {selector.name!r} learns from data: call hf_sparse.use_attention(model, "
            f"{settings.method!r}, dataset=...), or give SparseConfig a dataset"
        )
    inputs = Inputs.of(query, key, value, mask, scaling, settings)
    selection = selector.select(inputs, settings, learned)
    out = attend(inputs, selection, residual(inputs, settings), dropout)
    batch, heads, length, _ = query.shape
    rows = out.view(batch, key.shape[1], length, inputs.groups, -1).transpose(1, 2).contiguous()
    return rows.view(batch, length, heads, -1).to(query.dtype)


def parts(settings: AttentionSettings) -> tuple[Selector, type[Residual]]:
    """The selector and the residual that settings name.

    Raises:
        ConfigError: there is none of that name.
    """
    return SELECTORS.find(settings.selector)(), RESIDUALS.find(settings.residual)


def register_attentions() -> None:
    """Make every method known to transformers."""
    for method in METHODS:
        ALL_ATTENTION_FUNCTIONS.register(method, partial(attention, method=method))
        ALL_MASK_ATTENTION_FUNCTIONS.register(method, lazy_mask)
