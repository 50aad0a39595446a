"""Models <-> files: what a sparse state dict looks like, and what is saved with it.

Keys are transformers' in-memory names, not a family's historic ones: those are reached by
operations on dense weights (splitting, merging), which packed values would not survive.
"""

from __future__ import annotations

import os
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..checkpoint.attention_file import write_attention
from ..checkpoint.commit import EVALUATION_FILE, REPORT_FILE
from ..checkpoint.folder import write_folder
from ..checkpoint.weight_files import CONFIG_FILE
from ..core.json_records import json_text
from ..core.logging import get_logger
from ..core.sizes import read_size
from ..layers import sparse_layers
from .card import is_own_card, model_card
from .hub_files import CARD
from .push import push_to_hub

logger = get_logger(__name__)


def install_saving(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` and `model.push_to_hub` those of sparse models.

    Attributes of the instance, like accelerate's hooked forwards: they survive copies and
    pickling, and Trainer comes through them.
    """
    model.save_pretrained = partial(save_pretrained, model)  # type: ignore[method-assign]
    model.push_to_hub = partial(push_to_hub, model)  # type: ignore[method-assign]


def is_plain(model: PreTrainedModel) -> bool:
    """Is it an ordinary model, that only lost experts, and is saved as one?"""
    return not hasattr(model.config, "quantization_config") and not sparse_layers(model)


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
        SaveError: the path is a file, or writing failed; says what is there now.
    """
    names = ("repo_id", *signature(model.push_to_hub).parameters)
    hub = {name: kwargs.pop(name) for name in names if name in kwargs} if push_to_hub else {}
    if "max_shard_size" in hub:
        kwargs["max_shard_size"] = hub["max_shard_size"]
    if "max_shard_size" in kwargs:
        kwargs["max_shard_size"] = read_size("max_shard_size", kwargs["max_shard_size"])
    if not is_plain(model):
        kwargs["save_original_format"] = False

    def write(folder: str) -> None:
        type(model).save_pretrained(model, folder, *args, **kwargs)
        if (
            Path(folder) / CONFIG_FILE
        ).is_file():  # else an adapter, or nothing: another rank saves
            write_companions(model, Path(folder))

    write_folder(save_directory, write, keep=is_own_card)
    if push_to_hub:
        model.push_to_hub(hub.pop("repo_id", Path(save_directory).resolve().name), **hub)


def write_companions(model: PreTrainedModel, folder: Path) -> None:
    """What goes beside the weights: pruning report, evaluation, learned attention, model card."""
    quantizer = model.hf_quantizer
    held = {REPORT_FILE: quantizer.report, EVALUATION_FILE: quantizer.evaluation}
    for name, value in held.items():
        if value is not None:
            text = json_text(value.to_dict())
            (folder / name).write_text(text, encoding="utf-8")
    write_attention(model, folder)
    model_card(model, folder).save(folder / CARD)
