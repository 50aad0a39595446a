"""The low-rank part of a model as an ordinary PEFT LoRA adapter on its sparse base."""

from __future__ import annotations

import os
import re

from accelerate.utils import align_module_device
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.folder import write_folder
from ..core.errors import ConfigError
from ..layers import sparse_layers


def split_low_rank(model: PreTrainedModel) -> PeftModel:
    """Turn a model's low-rank parts into a LoRA adapter, to be trained with the sparse part fixed.

    The model itself becomes the sparse base: its layers lose their low-rank parts, which are the
    adapter's weights now. `unload()` of the result gives the base alone, to save it.

    Args:
        model: with low-rank parts, as `SparseConfig(low_rank=...)` makes them; changed in place.

    Returns:
        The model with a trainable adapter, of the same outputs.

    Raises:
        ConfigError: the model has no low-rank part.
    """
    config, weights = _adapter(model)
    layers = sparse_layers(model)
    adapted: PeftModel = get_peft_model(model, config)
    set_peft_model_state_dict(adapted, weights)
    for layer in layers.values():
        layer.drop_low_rank()
    return adapted


def export_low_rank(model: PreTrainedModel, save_directory: str | os.PathLike[str]) -> None:
    """Write a model's low-rank parts as a PEFT LoRA adapter; the model is unchanged.

    `PeftModel.from_pretrained` puts it on the base that `split_low_rank` leaves. On a model that
    has its low-rank parts inside, they would count twice.

    Args:
        model: with low-rank parts.
        save_directory: folder; created if it isn't there.

    Raises:
        ConfigError: the model has no low-rank part.
        SaveError: the path is a file, or writing failed; what was there before is as it was.
    """
    config, weights = _adapter(model)

    def save(folder: str) -> None:
        config.save_pretrained(folder)
        save_file(weights, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), {"format": "pt"})

    write_folder(save_directory, save)


def _adapter(model: PreTrainedModel) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter's config, of scale 1 for every layer, and its weights under PEFT's names."""
    ranks: dict[str, int] = {}
    weights: dict[str, Tensor] = {}
    for name, layer in sparse_layers(model).items():
        with align_module_device(layer):
            low_rank = layer.low_rank
            if low_rank is None:
                continue
            ranks[name] = low_rank.rank
            weights[f"base_model.model.{name}.lora_A.weight"] = low_rank.a.detach().clone()
            weights[f"base_model.model.{name}.lora_B.weight"] = low_rank.b.detach().clone()
    if not ranks:
        raise ConfigError(
            f"{type(model).__name__} has no low-rank part: prune with SparseConfig(low_rank=8, ...)"
        )
    rank = max(ranks.values())
    others = {re.escape(name): r for name, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        init_lora_weights=False,
    )
    return config, weights
