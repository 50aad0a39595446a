"""A few steps on the CPU, of Trainer or by hand."""

from pathlib import Path

import torch
from transformers import TrainingArguments


def arguments(folder: Path, **changes) -> TrainingArguments:
    """Four steps that print and save nothing."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
    }
    return TrainingArguments(**(settings | changes))


def rows_of(token_ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in token_ids]


def losses_of(model, token_ids: torch.Tensor, optimizer, steps: int) -> list[float]:
    """The losses of training steps on the same batch."""
    losses = []
    for _ in range(steps):
        loss = model(token_ids, labels=token_ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
