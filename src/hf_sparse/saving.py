"""Models <-> files: what a sparse state dict looks like, and what is saved with it.

Keys are transformers' in-memory names, not a family's historic ones: those are reached by
operations on dense weights (splitting, merging), which packed values would not survive.
"""

from __future__ import annotations

import json
import os
from copy import deepcopy
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.utils import cached_file

from .checkpoint import PackedLayer, metadata
from .errors import CheckpointError
from .hub.card import model_card
from .hub.push import push_to_hub
from .hub.source import CARD
from .layers import SparseExperts, SparseLinear, sparse_layers
from .layers.linear import VALUES
from .logging import get_logger
from .report import EVALUATION_FILE, REPORT_FILE, PruningReport
from .writing import write_folder

logger = get_logger(__name__)


def sparse_state_dict(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model's state dict with packed layers under their file keys, and the files' metadata.

    Tensors that accelerate has offloaded from sparse layers are brought to the CPU.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    layers = sparse_layers(model)
    described = []
    for name, layer in layers.items():
        with align_module_device(layer):
            for key in layer.format.specs(layer.shape):
                held = state.pop(f"{name}.{layer.buffer_name(key)}")
                state[f"{name}.{key}"] = layer.packed[key].clone() if held.is_meta else held
            if (low_rank := layer.low_rank) is not None:
                for key, tensor in low_rank.tensors().items():
                    if state[f"{name}.{key}"].is_meta:
                        state[f"{name}.{key}"] = tensor.clone()
            if layer.bias is not None and state[f"{name}.bias"].is_meta:
                state[f"{name}.bias"] = layer.bias.detach().clone()
        described.append(PackedLayer(name, layer.format, layer.shape, layer.axes, layer.rank))
    return state, metadata(described)


class ValuesRenaming(WeightRenaming):
    """Leads the values of packed layers, stored as NAME.weight, into the layers' buffers.

    A dictionary of names instead of one regex per layer: a checkpoint may have thousands.
    """

    __slots__ = ("layers",)

    def __init__(
        self, source_patterns: Any, target_patterns: Any, layers: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(source_patterns, target_patterns)
        self.layers = layers

    @classmethod
    def of(cls, layers: frozenset[str]) -> ValuesRenaming:
        """The renaming for layers with these names in the checkpoint."""
        return cls(r"\.weight$", f".{VALUES}", layers)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        name, _, local = source_key.rpartition(".")
        if local != "weight" or name not in self.layers:
            return source_key, None
        self._was_used = True  # type: ignore[misc]
        return f"{name}.{VALUES}", self.source_patterns[0]


def install_saving(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` and `model.push_to_hub` those of sparse models.

    Attributes of the instance, like accelerate's hooked forwards: they survive copies and
    pickling, and Trainer comes through them.
    """
    model.save_pretrained = partial(save_pretrained, model)  # type: ignore[method-assign]
    model.push_to_hub = partial(push_to_hub, model)  # type: ignore[method-assign]


def remove_saving(model: PreTrainedModel) -> None:
    """Undo `install_saving`."""
    for name in ("save_pretrained", "push_to_hub"):
        model.__dict__.pop(name, None)


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    *args: Any,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """transformers' `save_pretrained`, so that files appear complete or not at all.

    What pruning reported goes beside the weights, as pruning_report.json, and a model card made
    from it, as README.md, unless the folder has one that somebody wrote.

    Args:
        model: the model to save.
        save_directory: folder; created if it isn't there.
        push_to_hub: push as well, once the folder is complete; `repo_id` (default: the folder's
            name) and `model.push_to_hub`'s other arguments may follow.
        args, kwargs: as for `PreTrainedModel.save_pretrained`.

    Raises:
        SaveError: the path is a file, or writing failed; what was there before is as it was.
    """
    names = ("repo_id", *signature(model.push_to_hub).parameters)
    hub = {name: kwargs.pop(name) for name in names if name in kwargs} if push_to_hub else {}
    if "max_shard_size" in hub:
        kwargs["max_shard_size"] = hub["max_shard_size"]
    kwargs["save_original_format"] = False

    def write(folder: str) -> None:
        type(model).save_pretrained(model, folder, *args, **kwargs)
        _write_companions(model, Path(folder))

    write_folder(save_directory, write)
    if push_to_hub:
        model.push_to_hub(hub.pop("repo_id", Path(save_directory).resolve().name), **hub)


def _write_companions(model: PreTrainedModel, folder: Path) -> None:
    """What goes beside the weights: the pruning report, the evaluation and the model card."""
    quantizer = model.hf_quantizer
    held = {REPORT_FILE: quantizer.report, EVALUATION_FILE: quantizer.evaluation}
    for name, value in held.items():
        if value is not None:
            text = json.dumps(value.to_dict(), indent=2)
            (folder / name).write_text(text, encoding="utf-8")
    model_card(model, folder).save(folder / CARD)


def saved_report(folder: Path) -> PruningReport | None:
    """The report that was saved with a checkpoint; None if there is none that can be used.

    Args:
        folder: where its files lie. If that is in the cache of the Hub, the report is fetched.
    """
    try:
        if folder.parent.name == "snapshots":  # .../models--OWNER--NAME/snapshots/COMMIT
            cache, repository = folder.parents[2], folder.parents[1].name
            name = repository.removeprefix("models--").replace("--", "/")
            cached_file(name, REPORT_FILE, cache_dir=str(cache), revision=folder.name)
        return PruningReport.from_folder(folder)
    except CheckpointError as error:
        logger.warning("the model is loaded without its report: %s", str(error))
    except OSError as error:
        logger.debug("the model is loaded without its report: %s", str(error))
    return None


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
        max_shard_size: as for `PreTrainedModel.save_pretrained`.

    Raises:
        SaveError: the path is a file, or writing failed; what was there before is as it was.
    """
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
    settings = {"state_dict": state, "max_shard_size": max_shard_size}
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
