"""The model that a config.json describes, without its weights.

It tells what no file of weights does: which weights are linear layers, and under which names this
version of transformers keeps what an older one wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from .errors import CheckpointError
from .legacy import Parameter

# Buffers that files of older versions of transformers hold, and no longer needs.
_FORMER_BUFFERS = r"(rotary_emb\.inv_freq|(^|\.)position_ids)$"


def empty_model(config: Mapping[str, Any], folder: Path) -> PreTrainedModel:
    """The model that the content of a config.json describes, on the meta device.

    Its class is looked up in transformers' own tables; no name in the config becomes an import.

    Raises:
        CheckpointError: transformers doesn't know it, or can't build it; names the folder.
    """
    kind, names = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{folder}: this transformers has no model type {kind!r}")
    try:
        described = CONFIG_MAPPING[kind].from_dict(dict(config))
        named = names if isinstance(names, list) else []
        classes = [cls for cls in _model_classes(described) if cls.__name__ in named]
        if classes:
            with torch.device("meta"):
                model: PreTrainedModel = classes[0](described)
            return model
    except Exception as error:
        raise CheckpointError(
            f"{folder}: transformers can't build the model in config.json: {error}"
        ) from error
    raise CheckpointError(f"{folder}: this transformers has no {kind!r} model called {names!r}")


def _model_classes(config: PretrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """All classes of models that transformers' auto classes have for a config."""
    known: list[Any] = [value for value in vars(modeling_auto).values() if isinstance(value, type)]
    for auto in known:
        if issubclass(auto, _BaseAutoModelClass) and auto._model_mapping:
            found = auto._model_mapping.get(type(config), ())
            yield from found if isinstance(found, (tuple, list)) else (found,)


def renaming(
    model: PreTrainedModel, expected: dict[str, Tensor]
) -> Callable[[Parameter], str | None]:
    """A function from a stored parameter to its name in memory, as transformers would load it.

    It gives None for what the model has not, and raises a CheckpointError for what takes more than
    a new name. `expected` is the model's state dict.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]

    def rename(parameter: Parameter) -> str | None:
        merged = False
        for name in parameter.names:
            renamed, operation = rename_source_key(
                name, renamings, converters, model.base_model_prefix, expected
            )
            if operation is None and renamed in expected:
                return str(renamed)
            merged = merged or operation is not None
        if merged:
            raise parameter.origin.error(
                "is one of several weights that this transformers merges into one, or one that it "
                "splits: such models can't be converted"
            )
        return None

    return rename


def is_needed(model: PreTrainedModel, key: str) -> bool:
    """Is a tensor that the model has no place for an error? Some are known to be left over."""
    return not _matches((*(model._keys_to_ignore_on_load_unexpected or ()), _FORMER_BUFFERS), key)


def may_be_missing(model: PreTrainedModel, name: str) -> bool:
    """Does the model make up for a tensor that no file has?"""
    return _matches(model._keys_to_ignore_on_load_missing or (), name)


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
