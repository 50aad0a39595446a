"""What transformers has noted of a model that it takes for quantised, taken back."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def make_plain(model: PreTrainedModel) -> None:
    """Take back what transformers has noted of a model that was to be quantised."""
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("quantization_method", None)
    model.is_quantized = False
    unmark(model)


def unmark(model: nn.Module) -> None:
    """Let no config say any more that weights are to be used through their layers alone."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
