"""The model that a config.json describes, without its weights.

It tells what no file of weights does: which weights are linear layers, and where they belong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ..core.errors import CheckpointError
from .config_numbers import bounded_modules, check_numbers


def empty_model(
    config: Mapping[str, Any], folder: Path, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model that the content of a config.json describes, on the meta device.

    Its class is looked up in transformers' own tables; no name in the config becomes an import.

    Args:
        config: that content.
        folder: where it is from.
        dtype: as of `from_pretrained`; None for torch's default.

    Raises:
        CheckpointError: transformers doesn't know it, or can't build it, or no model has such
            numbers; names the folder.
    """
    kind, names = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{folder}: this transformers has no model type {kind!r}")
    check_numbers(config, folder)
    try:
        described = CONFIG_MAPPING[kind].from_dict(dict(config))
        named = names if isinstance(names, list) else []
        classes = [cls for cls in _model_classes(described) if cls.__name__ in named]
        if classes:
            with torch.device("meta"), bounded_modules(folder):
                if dtype is None:
                    return classes[0](described)
                model: PreTrainedModel = classes[0]._from_config(described, dtype=dtype)
            return model
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder}: transformers can't build the model in config.json: {error}"
        ) from error
    if not names:
        raise CheckpointError(
            f"{folder}: its config.json has no 'architectures', the model's class"
        )
    raise CheckpointError(f"{folder}: this transformers has no {kind!r} model called {names!r}")


def _model_classes(config: PretrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """All classes of models that transformers' auto classes have for a config."""
    known: list[Any] = [value for value in vars(modeling_auto).values() if isinstance(value, type)]
    for auto in known:
        if issubclass(auto, _BaseAutoModelClass) and auto._model_mapping:
            found = auto._model_mapping.get(type(config), ())
            yield from found if isinstance(found, (tuple, list)) else (found,)
