"""Layers of transformers models that stay dense unless a user asks for them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def default_dense(model: nn.Module) -> dict[str, str]:
    """Layers that stay dense unless asked for: heads, tied weights, what needs fp32.

    Args:
        model: a transformers model, or any module with some inside; others have no such layers.
    """
    if isinstance(model, PreTrainedModel):
        return _of_model(model)
    return {
        f"{child}.{name}".rstrip("."): reason
        for child, module in model.named_children()
        for name, reason in default_dense(module).items()
    }


def _of_model(model: PreTrainedModel) -> dict[str, str]:
    reasons: dict[str, str] = {}
    base = model.base_model
    inside = {id(module) for module in base.modules()}
    head = model.get_output_embeddings()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {key.removesuffix(".weight") for pair in tied.items() for key in pair}
    fp32 = [
        name
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(model, attribute, None) or ()
    ]
    for name, module in model.named_modules():
        if any(part in name.split(".") or part in name for part in fp32):
            reasons[name] = "the model keeps it in fp32"
        if module is head or id(module) not in inside:
            reasons[name] = "it belongs to the output head"
        if name in tied_names:
            reasons[name] = "its weight is tied"
    return reasons
