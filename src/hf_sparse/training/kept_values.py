"""The kept values of a model's sparse layers as its parameters, and back."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..core.errors import TrainingError
from ..layers import SparseLinear, sparse_layers

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def prepare_for_training(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Make the kept values of a model's sparse layers its parameters, in place.

    Each sparse layer then has a parameter NAME.weight_values of the shape in which its values are
    stored, (kept,) or (out, kept of a row), and so has whatever follows from it: gradients, the
    state of an optimiser, what DDP sends. The pattern can't change. A low-rank part is trained,
    too. Until `finish_training`, layers unpack their weight at every call; saving, loading and
    generating work as before, and what is saved is in the layers' formats.

    Args:
        model: with sparse layers, in memory, without adapters.
        dtype: of the values. fp32, the default, also suits a model in bf16 or under autocast:
            products are computed in the dtype of the inputs, the optimiser's steps aren't rounded
            away. In bf16 a step below 1/256 of a value may be lost.

    Raises:
        TrainingError: the model has no sparse layer, one that is quantised or offloaded, or an
            adapter; or the dtype is another one. The model is left as it was.
    """
    if dtype not in DTYPES:
        names = ", ".join(str(known) for known in DTYPES)
        raise TrainingError(f"dtype={dtype!r} can't be trained in: pass one of {names}")
    layers = sparse_layers(model)
    if not layers:
        raise TrainingError(
            f"{type(model).__name__} has no sparse layer to train: prune it first, or load a "
            "sparse checkpoint"
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TrainingError(
            f"{type(model).__name__} has adapters, which are trained on top of fixed values: "
            "merge or unload them to train the values themselves"
        )
    for name, layer in layers.items():
        _check_trainable(name, layer)
    for layer in layers.values():
        layer.train_values(dtype)
    _tell_quantizer(model, True)


def finish_training(model: nn.Module) -> None:
    """Undo `prepare_for_training`: values in the model's dtype, fixed, multiplied by fast kernels.

    Needs not be called to save a model, only to run it at full speed in the same process.
    """
    for layer in sparse_layers(model).values():
        layer.fix_values()
    _tell_quantizer(model, False)


def _check_trainable(name: str, layer: SparseLinear) -> None:
    if (grid := layer.format.grid) is not None:
        raise TrainingError(
            f"{name} holds codes of {grid.bits} bits, which have no gradient: train a "
            "LoRA adapter on the model (peft.get_peft_model), or prune without bits="
        )
    hook = getattr(layer, "_hf_hook", None)
    offloaded = isinstance(hook, AlignDevicesHook) and hook.offload
    if offloaded or any(tensor.is_meta for tensor in layer.buffers()):
        raise TrainingError(
            f"{name} is offloaded, its values can't be trained: load the model without device_map"
        )


def _tell_quantizer(model: nn.Module, trains_values: bool) -> None:
    """Trainer asks the quantizer whether a model may be trained without an adapter."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.trains_values = trains_values
