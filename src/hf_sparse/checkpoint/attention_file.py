"""What a model's sparse attention has learned, in a file beside the weights."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..core.errors import CheckpointError
from ..core.untrusted_text import brief
from ..layers.attention.interface import states
from .commit import ATTENTION_FILE
from .companion import companion

SELECTOR = "selector"  # whose tensors they are, in the file's metadata


def write_attention(model: nn.Module, folder: Path) -> None:
    """Write it, if there is any; keys are those of the attention layers and of their tensors."""
    held = states(model)
    tensors = {
        f"{name}.{key}": tensor.contiguous().cpu()
        for name, state in held.items()
        for key, tensor in state.learned().items()
    }
    if tensors:
        selector = next(iter(held.values())).settings.selector
        save_file(tensors, folder / ATTENTION_FILE, {SELECTOR: selector})


def read_attention(model: nn.Module, folder: Path) -> None:
    """Give a model's attention layers what they had learned, if they are of those that learn.

    It stays on the CPU: it is small, and the layers that need it may be offloaded.

    Args:
        model: whose attention has been installed.
        folder: where its weights lie. In the Hub's cache the file is fetched.

    Raises:
        CheckpointError: the file is missing or damaged, or is of another model or selector; names
            the tensor.
    """
    held = {name: state for name, state in states(model).items() if state.learns}
    if not held:
        return
    path = folder / ATTENTION_FILE
    try:
        with safe_open(companion(folder, ATTENTION_FILE), framework="pt") as file:
            learned_by = (file.metadata() or {}).get(SELECTOR)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: what the attention has learned can't be read: {error}. "
            'attn_implementation="sdpa" loads the model without it, hf_sparse.use_attention learns '
            "it anew"
        ) from None
    selector = next(iter(held.values())).settings.selector
    if learned_by != selector:
        raise CheckpointError(
            f"{path}: holds what selector {brief(learned_by)} has learned, not {selector!r}: load "
            "the model with the attention that it was saved with, then call "
            "hf_sparse.use_attention(model, ..., dataset=...)"
        )
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
        state.take({"centres": centres})
