"""One forward pass of a model over a batch of calibration data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.errors import CalibrationError, HfSparseError
from .batches import Batch
from .towers import lacking_inputs


def call_model(model: nn.Module, batch: Batch) -> Any:
    """The model's outputs for a batch, whose floating-point inputs become of the model's dtype.

    Raises:
        CalibrationError: it can't run on these data; names what they have and lack.
    """
    device = input_device(model)
    dtype = getattr(model, "dtype", None)  # processors give fp32 pixels and audio
    inputs = {key: value.to(device) for key, value in batch.items()}
    floats = {k: v.to(dtype) for k, v in inputs.items() if dtype and v.is_floating_point()}
    try:
        return model(**inputs | floats)
    except (HfSparseError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CalibrationError(
            f"{type(model).__name__} can't run on the calibration data: "
            f"{type(error).__name__}: {error}. The data have {', '.join(sorted(batch))}; it "
            f"also takes {', '.join(lacking_inputs(model, batch)) or 'nothing else'}"
        ) from error


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs. accelerate moves those of offloaded modules by itself."""
    device: torch.device = getattr(model, "device", None) or next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """No key-value caches: a block is run more than once on the same inputs."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "use_cache")}
    before = {key: config.use_cache for key, config in configs.items()}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for key, config in configs.items():
            config.use_cache = before[key]
