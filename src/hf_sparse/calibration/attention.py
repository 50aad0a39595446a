"""Sparse attention for a model: what a user asks for, what a config says, what is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers import PreTrainedModel

from ..config.arguments import ARGUMENTS
from ..config.sparse_config import SparseConfig
from ..core.attention_settings import AttentionSettings
from ..core.errors import ConfigError
from ..core.logging import get_logger
from ..core.untrusted_text import brief
from ..core.unwrapped import unwrapped
from ..layers.attention.install import check, install, kept_on_failure, remove, watched
from ..layers.attention.interface import STATE, AttentionState, parts
from ..layers.attention.masks import LazyMask
from .forward import call_model
from .load import load_calibration
from .tokenizers import load_tokenizer

logger = get_logger(__name__)

SAMPLES = 1024  # of a layer's queries, and of its keys


def use_attention(
    model: nn.Module,
    attention: str | Mapping[str, Any] | AttentionSettings | None,
    dataset: Any = None,
    *,
    tokenizer: Any = None,
    num_samples: int = 4,
    seq_len: int | None = None,
    example: Mapping[str, Any] | None = None,
) -> None:
    """Say what a loaded model's attention is to be, from its next call on.

    Attention to few keys and of a single query stays exact, see `AttentionSettings`. A model that
    hf_sparse has pruned is saved with it from then on.

    Args:
        model: a transformers model that calls transformers' attention interface, or PEFT's or a
            data-parallel wrapper of one; not a compiled one.
        attention: a method, "hs_block", "hs_smyrf", "hs_routing", "hs_mongoose", "hs_performer" or
            "hs_scatterbrain"; settings, as a dict or `AttentionSettings`; None for exact attention.
        dataset: as `SparseConfig.dataset`, for the methods that learn: "hs_routing" and
            "hs_mongoose".
        tokenizer: as `SparseConfig.tokenizer`.
        num_samples: samples to learn from.
        seq_len: tokens of each. Default min(2048, what the model allows).
        example: inputs of a forward pass, which is made to see what the model does; None makes
            some up: two tokens, or an image.

    Raises:
        ConfigError: there is no such method or setting, it needs data, or it can't be this model's
            attention: it has position bias or soft caps, or an attention of its own.
        CalibrationError: the data are unusable.
    """
    settings = ARGUMENTS["attention"].check("attention", attention)
    if settings is not None and isinstance(model, OptimizedModule):
        raise ConfigError(
            "attention stays exact under torch.compile: call use_attention on the model that isn't "
            "compiled, and run that one on long prompts"
        )
    inner: Any = unwrapped(model)
    _require_transformers(inner)
    if settings is None:
        remove(inner)
    else:
        data = SparseConfig(
            method="magnitude", sparsity=0, attention=settings, dataset=dataset,
            tokenizer=tokenizer, num_samples=num_samples, seq_len=seq_len,
        )  # fmt: skip
        data.check_data()
        with kept_on_failure(inner):
            install(inner, settings, example)
            learn(inner, data)
    config = getattr(getattr(inner, "hf_quantizer", None), "quantization_config", None)
    if isinstance(config, SparseConfig):
        config.attention = settings


def settle_attention(config: SparseConfig, implementation: str | None, saved: bool) -> None:
    """Let an `attn_implementation` that was passed to `from_pretrained` win over a saved attention.

    Args:
        config: of the model that is about to be loaded.
        implementation: what was passed, None if nothing was.
        saved: is the model sparse already? Otherwise the config's attention was asked for as well.

    Raises:
        ConfigError: two attentions are asked for.
    """
    if config.attention is None or implementation in (None, config.attention.method):
        return
    if not saved:
        raise ConfigError(
            f"attn_implementation={brief(implementation)} and attention with method "
            f"{config.attention.method!r} are both asked for: pass one of them"
        )
    logger.warning(
        "attn_implementation=%s was passed: the saved attention %r isn't used, nor saved again",
        brief(implementation),
        config.attention.method,
    )
    config.attention = None


def check_attention(model: nn.Module, config: SparseConfig) -> None:
    """Raise a ConfigError if a model can't have the attention that a config asks for."""
    if config.attention is not None:
        _require_transformers(model)
        check(model, config.attention)


def apply_attention(model: PreTrainedModel, config: SparseConfig) -> None:
    """Give a model the attention that a config asks for, if it does."""
    if config.attention is not None:
        install(model, config.attention)


def learn(model: PreTrainedModel, config: SparseConfig) -> None:
    """Let a model's sparse attention learn from a config's data, if it is one that does."""
    settings = config.attention
    if settings is None or not parts(settings)[0].learns:
        return
    data = load_calibration(model, config, lambda: load_tokenizer(config.tokenizer, model))
    assert data is not None  # `check_data` has seen to it
    found: dict[AttentionState, list[tuple[Tensor, Tensor]]] = {}
    generator = torch.Generator().manual_seed(settings.seed)
    count = max(1, SAMPLES // len(data.batches))

    def observe(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float
    ) -> None:
        state = getattr(module, STATE, None)
        if state is not None and q.shape[2] == k.shape[2]:
            real = mask.valid[0] if isinstance(mask, LazyMask) else None
            sample = some_queries_and_keys(q[:1] * scaling, k[:1], count, generator, real)
            found.setdefault(state, []).append(sample)

    with watched(model, observe):
        for batch in data.batches:
            call_model(model, batch)
    for state, samples in found.items():
        queries, keys = (torch.cat(vectors, dim=1) for vectors in zip(*samples, strict=True))
        state.take(parts(settings)[0].learn(queries, keys, settings))


def some_queries_and_keys(
    query: Tensor, key: Tensor, count: int, generator: torch.Generator, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and keys at places of one sample that are drawn at random.

    Args:
        query, key: (1, heads, tokens, channels); of query heads that share a key head the first.
        count: places at most.
        generator: draws them.
        real: tokens that are no padding; None for all.

    Returns:
        Both as (key heads, places, channels).
    """
    heads, length = key.shape[1:3]
    everywhere = torch.ones(length, dtype=torch.bool, device=key.device)
    places = (everywhere if real is None else real).nonzero()[:, 0]
    chosen = places[torch.randperm(len(places), generator=generator)[:count].to(places.device)]
    first = query[0].view(heads, -1, *query.shape[2:])[:, 0]
    return first[:, chosen], key[0, :, chosen]


def _require_transformers(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"attention is for models of transformers, found {type(model).__name__}: leave it out"
        )
