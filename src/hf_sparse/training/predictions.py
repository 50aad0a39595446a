"""Which of a model's predictions count in training, and what they are computed in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def chosen_positions(
    logits: Tensor, labels: Tensor | None, attention_mask: Tensor | None, causal: bool
) -> Tensor | None:
    """Which positions of (batch, tokens, ...) count; None for outputs that have no positions."""
    if logits.ndim < 3:
        return None
    if labels is not None and labels.shape == logits.shape[:-1]:
        if causal:  # position t predicts token t + 1
            labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        return labels != -100
    if attention_mask is not None and attention_mask.shape == logits.shape[:-1]:
        return attention_mask.bool()
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)


def wide(tensor: Tensor) -> Tensor:
    """In fp32, unless it is that or wider."""
    return tensor if tensor.element_size() >= 4 else tensor.float()
