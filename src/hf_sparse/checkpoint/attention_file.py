"""What a model's sparse attention has learned, in a file beside the weights."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..core.errors import CheckpointError
from ..layers.attention.interface import states
from .commit import ATTENTION_FILE


def write_attention(model: nn.Module, folder: Path) -> None:
    """Write it, if there is any; keys are those of the attention layers and of their tensors."""
    tensors = {
        f"{name}.{key}": tensor.contiguous().cpu()
        for name, state in states(model).items()
        for key, tensor in state.learned().items()
    }
    if tensors:
        save_file(tensors, folder / ATTENTION_FILE)


def read_attention(model: nn.Module, folder: Path) -> None:
    """Give a model's attention layers what they had learned, if they are of those that learn.

    Raises:
        CheckpointError: the file is missing or damaged, or is of another model; names the tensor.
    """
    held = {name: state for name, state in states(model).items() if state.learns}
    if not held:
        return
    path = folder / ATTENTION_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: what the attention has learned can't be read: {error}. "
            "hf_sparse.use_attention learns it anew"
        ) from None
    for name, state in held.items():
        key = f"{name}.centres"
        tensor = tensors.get(key)
        if tensor is None:
            raise CheckpointError(f"{path}: {key} is missing")
        expected = state.heads, state.channels
        if tensor.dim() != 3 or (tensor.shape[0], tensor.shape[2]) != expected:
            raise CheckpointError(
                f"{path}: {key} has shape {tuple(tensor.shape)}, expected "
                f"({state.heads}, n, {state.channels})"
            )
        centres = tensor.float()
        if not tensor.numel() or not tensor.is_floating_point() or not centres.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds what is no finite number")
        state.take({"centres": centres.to(next(model.parameters()).device)})
