"""A model's attention made sparse, or exact again: checked by one pass before anything is kept."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.attention_settings import METHODS, AttentionSettings
from ...core.errors import ConfigError, HfSparseError
from ...core.evaluation_mode import evaluation_mode
from ...core.input_device import input_device
from .interface import STATE, AttentionState, Observer, observed, parts
from .masks import LazyMask

EXACT = "sdpa"


def install(
    model: PreTrainedModel, settings: AttentionSettings, example: Mapping[str, Any] | None = None
) -> None:
    """Give a model sparse attention; what its selector learns comes later.

    Args:
        model: on the device where it runs.
        settings: the method and its numbers.
        example: inputs of a forward pass; None makes some up from the model's config.

    Raises:
        ConfigError: as of `check`; the model then is as it was.
    """
    called = check(model, settings, example)
    for module, (heads, channels) in called.items():
        setattr(module, STATE, AttentionState(settings, heads, channels))
    model.set_attn_implementation(settings.method)


def remove(model: PreTrainedModel) -> None:
    """Make a model's attention exact again; one that is exact stays as it is."""
    _drop_states(model)
    sparse = [key for key, name in _implementations(model).items() if name in METHODS]
    if sparse:
        model.set_attn_implementation(dict.fromkeys(sparse, EXACT))


def _drop_states(model: PreTrainedModel) -> None:
    for module in [m for m in model.modules() if hasattr(m, STATE)]:
        delattr(module, STATE)


def check(
    model: PreTrainedModel, settings: AttentionSettings, example: Mapping[str, Any] | None = None
) -> dict[nn.Module, tuple[int, int]]:
    """The layers that call an attention in one exact pass, with their key heads and channels.

    Raises:
        ConfigError: the model's attention can't be this one, or no inputs can be made up.
    """
    parts(settings)
    kind, method = type(model).__name__, settings.method
    called: dict[nn.Module, tuple[int, int]] = {}

    def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, by: float) -> None:
        if isinstance(mask, Tensor):
            raise ConfigError(
                f"{kind} makes the mask of {type(module).__name__} itself, maybe with a bias in "
                f"it, which {method!r} can't follow: leave attention out"
            )
        called[module] = k.shape[1], k.shape[3]

    inputs = dict(example) if example is not None else _made_up(model)
    with watched(model, observe):
        try:
            model(**inputs)
        except HfSparseError:
            raise
        except Exception as error:
            reads = f"it reads or changes the mask itself, which {method!r} doesn't make before"
            why = reads if LazyMask.__name__ in str(error) else f"{type(error).__name__}: {error}"
            raise ConfigError(f"{kind} can't run with attention {method!r}: {why}") from error
    if not called:
        raise ConfigError(
            f"{kind} doesn't call transformers' attention interface: its attention can't be "
            f"{method!r}, leave attention out"
        )
    return called


@contextmanager
def watched(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """A model whose attention is exact and tells an observer of each call; without gradients and
    dropout. Then it is what it was."""
    before = _implementations(model)
    model.set_attn_implementation(AttentionSettings.method)
    try:
        with evaluation_mode(model), torch.no_grad(), observed(observer):
            yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def kept_on_failure(model: PreTrainedModel) -> Iterator[None]:
    """A model whose attention is what it was if this block raises."""
    before = _implementations(model)
    states = {module: getattr(module, STATE, None) for module in model.modules()}
    try:
        yield
    except BaseException:
        _drop_states(model)
        for module, state in states.items():
            if state is not None:
                setattr(module, STATE, state)
        model.set_attn_implementation(before)
        raise


def _implementations(model: PreTrainedModel) -> dict[str, str]:
    """The attention of a model's config and of those inside it, as transformers takes them."""
    config = model.config
    inner = {key: getattr(config, key, None) for key in config.sub_configs}
    own = {"": config._attn_implementation}
    return own | {k: sub._attn_implementation for k, sub in inner.items() if sub is not None}


def _made_up(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two tokens, or one image."""
    main, config, device = model.main_input_name, model.config, input_device(model)
    if main == "input_ids":
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        decoder = "decoder_input_ids" in inspect.signature(model.forward).parameters
        return {"input_ids": ids} | ({"decoder_input_ids": ids} if decoder else {})
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if main == "pixel_values" and size is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return {main: torch.zeros(1, channels, *sides, dtype=model.dtype, device=device)}
    raise ConfigError(
        f"no {main} can be made up for {type(model).__name__}: call hf_sparse.use_attention(model, "
        "..., example={...}) with inputs of its forward"
    )
