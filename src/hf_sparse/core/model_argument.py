"""What is passed as a model is one."""

from __future__ import annotations

from torch import nn

from .errors import ConfigError


def require_model(model: object) -> None:
    """Raise a ConfigError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"a model is needed, an nn.Module, found {model!r:.80}: load one with from_pretrained"
        )
