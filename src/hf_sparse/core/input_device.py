"""Where a model takes its inputs."""

from __future__ import annotations

import itertools

import torch
from torch import nn


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs. accelerate moves those of offloaded modules by itself."""
    # Sparse layers hold buffers: without biases there may be no parameter left.
    tensors = itertools.chain(model.parameters(), model.buffers())
    device: torch.device = getattr(model, "device", None) or next(tensors).device
    return torch.device("cpu") if device.type == "meta" else device
