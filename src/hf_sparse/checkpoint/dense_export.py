"""A sparse model as an ordinary dense checkpoint."""

from __future__ import annotations

import os
from copy import deepcopy

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.model_argument import require_model
from ..core.sizes import read_size
from ..layers import SparseExperts, SparseLinear
from .folder import write_folder
from .state_dict import ValuesRenaming


def export_dense(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    max_shard_size: int | str = "50GB",
) -> None:
    """Write a sparse model as an ordinary dense checkpoint, zeros included; the model is unchanged.

    It has no trace of hf_sparse in its config, and loads in plain transformers and elsewhere.

    Args:
        model: a model with sparse layers.
        save_directory: folder; created if it isn't there.
        max_shard_size: of a weight file: bytes, or a text like "50GB" or "50GiB".

    Raises:
        ConfigError: it is no model, or the size none.
        SaveError: the path is a file, or writing failed; what was there before is as it was.
    """
    require_model(model)
    shard_size = read_size("max_shard_size", max_shard_size)
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        dense = type(model)(config).to(model.dtype)
    conversions = getattr(model, "_weight_conversions", None)
    if conversions and not any(isinstance(c, ValuesRenaming) for c in conversions):
        dense._weight_conversions = conversions
    if model.can_generate():
        dense.generation_config = model.generation_config
    state = _dense_state_dict(model)
    settings = {"state_dict": state, "max_shard_size": shard_size}
    write_folder(save_directory, lambda folder: dense.save_pretrained(folder, **settings))


def _dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All tensors as the dense architecture names and shapes them, offloaded ones on the CPU."""
    state: dict[str, Tensor] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(inside):
            continue
        if isinstance(module, SparseExperts):
            inside = tuple(f"{name}.{expert}." for expert in range(module.num_experts))
        prefix = f"{name}." if name else ""
        with torch.no_grad(), align_module_device(module):
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, SparseLinear):
                own["weight"] = module.axes.own(module.matrix).contiguous()  # type: ignore[assignment]
            else:
                skipped = module._non_persistent_buffers_set
                own |= {k: b for k, b in module.named_buffers(recurse=False) if k not in skipped}  # type: ignore[misc]
            if isinstance(module, SparseExperts):
                own |= module.fused_tensors()  # type: ignore[arg-type]
            offloaded = getattr(getattr(module, "_hf_hook", None), "offload", False)
            for key, tensor in own.items():
                state[prefix + key] = tensor.detach().clone() if offloaded else tensor.detach()
    return state
