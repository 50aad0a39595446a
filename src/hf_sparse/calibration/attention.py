"""Sparse attention for a model: what a user asks for, and what a config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config.arguments import ARGUMENTS
from ..config.sparse_config import SparseConfig
from ..core.attention_settings import AttentionSettings
from ..core.errors import ConfigError
from ..layers.attention.install import install, remove


def use_attention(
    model: nn.Module,
    attention: str | Mapping[str, Any] | AttentionSettings | None,
    example: Mapping[str, Any] | None = None,
) -> None:
    """Say what a loaded model's attention is to be, from its next call on.

    Attention to few keys and of a single query stays exact, see `AttentionSettings`. A model that
    hf_sparse has pruned is saved with it from then on.

    Args:
        model: a transformers model that calls transformers' attention interface.
        attention: a method, "hs_block", "hs_smyrf", "hs_routing", "hs_mongoose", "hs_performer" or
            "hs_scatterbrain"; settings, as a dict or `AttentionSettings`; None for exact attention.
        example: inputs of a forward pass, which is made to see what the model does; None makes
            some up: two tokens, or an image.

    Raises:
        ConfigError: there is no such method or setting, or it can't be this model's attention: it
            has position bias or soft caps, or an attention of its own.
    """
    settings = ARGUMENTS["attention"].check("attention", attention)
    wrapper: Any = model
    inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else wrapper
    _require_transformers(inner)
    if settings is None:
        remove(inner)
    else:
        install(inner, settings, example)
    config = getattr(getattr(inner, "hf_quantizer", None), "quantization_config", None)
    if isinstance(config, SparseConfig):
        config.attention = settings


def check_attention(model: nn.Module, config: SparseConfig) -> None:
    """Raise a ConfigError if a model can't have the attention that a config asks for."""
    if config.attention is not None:
        _require_transformers(model)
        install(model, config.attention)
        remove(model)


def apply_attention(model: PreTrainedModel, config: SparseConfig) -> None:
    """Give a model the attention that a config asks for, if it does."""
    if config.attention is not None:
        install(model, config.attention)


def _require_transformers(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"attention is for models of transformers, found {type(model).__name__}: leave it out"
        )
