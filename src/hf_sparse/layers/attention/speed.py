"""From how many keys on a sparse attention is faster than the exact one here: measured once."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.attention_settings import AttentionSettings
from ...kernels import timing
from ...kernels.machine import processor
from .interface import AttentionState, sparse, states
from .masks import LazyMask

LENGTHS = (1024, 2048, 4096, 8192)


def describe(model: nn.Module) -> str | None:
    """A line about a model's sparse attention on this machine; None if it has none."""
    found = list(states(model).values())
    if not found:
        return None
    state = found[0]
    settings = state.settings
    line = f"attention {settings.method}, {settings.keys} keys a query, from {settings.from_length}"
    speeds = {} if state.learns else measured(state)
    if not speeds:
        return f"{line} on; not measured here"
    faster = [length for length in LENGTHS if speeds[str(length)] > 1]
    pays = f"faster than exact from {faster[0]} on" if faster else f"not faster by {LENGTHS[-1]}"
    times = ", ".join(f"{speed:.2f} at {length}" for length, speed in speeds.items())
    return f"{line} on; here {pays} (speed over exact: {times})"


def measured(state: AttentionState) -> dict[str, float]:
    """Speed over exact causal attention of one head by number of keys, now or before; empty if
    measuring is switched off or the machine too busy."""
    if not timing.enabled():
        return {}
    settings = state.settings
    what = f"{settings.selector}, {settings.residual}, {settings.keys} keys, {settings.features}"
    blocks = f"blocks {settings.block} and {settings.key_block}, {state.channels} channels"
    key = f"{processor()}, attention of {what}, {blocks}"
    names = [str(length) for length in LENGTHS]
    return timing.remembered(key, names, partial(_measure, settings, state.channels)) or {}


def _measure(settings: AttentionSettings, channels: int) -> dict[str, float] | None:
    speeds = {}
    for length in LENGTHS:
        seconds = _seconds(length, settings, channels)
        if seconds is None:
            return None
        speeds[str(length)] = seconds["exact"] / seconds["sparse"]
    return speeds


def _seconds(length: int, settings: AttentionSettings, channels: int) -> timing.Measured | None:
    """Of one head by kind of attention."""
    tensor = torch.randn(3, 1, 1, length, channels, generator=torch.Generator().manual_seed(0))
    query, key, value = tensor.unbind(0)
    mask = LazyMask.plain(query, key, causal=True)
    mask.view(settings.block, settings.key_block)  # made once for all layers

    def exact(query: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def approximate(query: Tensor) -> Tensor:
        return sparse(query, key, value, mask, channels**-0.5, settings, {})

    return timing.compare({"exact": (exact, [query]), "sparse": (approximate, [query])})
