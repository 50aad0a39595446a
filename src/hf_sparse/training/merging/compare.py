"""How far a merged model's outputs are from the unmerged one's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.batches import Batch
from ...calibration.forward import call_model
from ...core.logging import progress_bar
from ...evaluation.agreement import kl_divergence
from ...evaluation.data import token_mask
from .report import Fidelity


@torch.no_grad()
def compare(
    model: nn.Module,
    unmerged: Callable[[], AbstractContextManager[None]],
    batches: Sequence[Batch],
) -> Fidelity:
    """Outputs of the merged and the unmerged model on all batches.

    Args:
        model: merged, in evaluation mode.
        unmerged: a context in which it is the unmerged one.
        batches: model inputs.
    """
    wrong, size, divergence, tokens = 0.0, 0.0, 0.0, 0
    logits = True
    with progress_bar(len(batches), "Comparing") as bar:
        for batch in batches:
            found, logits = _output(call_model(model, batch))
            with unmerged():
                expected, _ = _output(call_model(model, batch))
            mask = _mask(batch, expected)
            y, goal = found[mask].float(), expected[mask].float()
            wrong += float((y - goal).square().sum(dtype=torch.float64))
            size += float(goal.square().sum(dtype=torch.float64))
            tokens += len(goal)
            if logits:
                divergence += float(kl_divergence(goal, y).sum(dtype=torch.float64))
            bar.update()
    error = (wrong / size) ** 0.5 if size else 0.0
    return Fidelity(error, divergence / tokens if logits else None, tokens)


def _output(outputs: Any) -> tuple[Tensor, bool]:
    """Logits, or else the first tensor of a model's outputs; and whether it is logits."""
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits, True
    values = outputs.values() if isinstance(outputs, Mapping) else (outputs,)
    return next(value for value in values if isinstance(value, Tensor)), False


def _mask(batch: Batch, output: Tensor) -> Tensor:
    """Where an output (batch, tokens, ...) belongs to a token; everywhere if it has no tokens."""
    if "input_ids" in batch and output.shape[:2] == batch["input_ids"].shape:
        return token_mask(batch).to(output.device)
    return torch.ones(output.shape[:-1], dtype=torch.bool, device=output.device)
