"""Models without dropout for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Every module is in eval mode; afterwards each is in its own again, or its successor is."""
    before = [{name: m.training for name, m in model.named_modules()} for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, modes in zip(models, before, strict=True):
            for name, module in model.named_modules():
                module.training = modes.get(name, modes[""])
