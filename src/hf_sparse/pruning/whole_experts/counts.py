"""Where a config counts experts: found by building the model anew on the meta device.

A number of the config counts the experts of a mixture if the model that is built from the config
with a smaller one has fewer of them there, and differs in nothing outside the mixtures. So no
family's names are needed, and what a config that is loaded again will build is known beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ...core.errors import ConfigError
from ...layers.experts import is_fused
from ...layers.mixtures import Mixture

PER_LAYER = "per_layer_config"  # transformers' own dict {layer: {name: value}}


@dataclass(frozen=True)
class Field:
    """A value of a config.

    Attributes:
        path: the names of the configs inside the model's that lead to the one that has it.
        name: as the config has it.
        value: the new one.
    """

    path: tuple[str, ...]
    name: str
    value: Any

    def holder(self, config: Any) -> Any:
        """The config inside a model's config that has the value."""
        for name in self.path:
            config = getattr(config, name)
        return config


def built(model: PreTrainedModel, fields: Iterable[Field] = ()) -> PreTrainedModel:
    """The model that the config with some values changed stands for, on the meta device.

    The config goes through JSON's values, as one that is saved and loaded does.
    """
    config = deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    for field in fields:
        setattr(field.holder(config), field.name, field.value)
    with torch.device("meta"):
        anew: PreTrainedModel = type(model)(type(config).from_dict(config.to_dict()))
    return anew


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, under each of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def find_fields(
    model: PreTrainedModel, mixtures: Mapping[str, Mixture], kept: Mapping[str, int]
) -> list[Field]:
    """What is to change in a model's config for mixtures to have some number of experts.

    Args:
        model: with all its experts.
        mixtures: all of the model, by name.
        kept: how many experts of each are to be left.

    Raises:
        ConfigError: the config doesn't count them, or can't say that some layers have fewer than
            others.
    """
    whole = _shapes(built(model))
    found: list[Field] = []
    left = dict(kept)
    for path, name, value in _numbers(model.config):
        of_it = {m for m in mixtures if len(mixtures[m].experts) == value}
        if not of_it or value < 2:
            continue
        counted = of_it & _counted(model, whole, mixtures, Field(path, name, value - 1))
        if counted:
            found.append(_resized(model, mixtures, path, name, {m: kept[m] for m in counted}))
            left = {m: n for m, n in left.items() if m not in counted}
    if left:
        name = next(iter(left))
        raise ConfigError(
            f"no number in the config of {type(model).__name__} counts the experts of {name} and "
            "nothing else, so they can't be removed: leave experts out"
        )
    return found


def _numbers(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, int]]:
    """All integers of a config and of those inside it."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            yield from _numbers(value, (*path, name))
        elif type(value) is int:
            yield path, name, value


def _counted(
    model: PreTrainedModel,
    whole: Mapping[str, tuple[int, ...]],
    mixtures: Mapping[str, Mixture],
    field: Field,
) -> set[str]:
    """The mixtures that have as many experts as a value says, if nothing else depends on it."""
    try:
        other = built(model, [field])
    except Exception:  # whatever a config or a model says to a number that it can't have
        return set()
    now = _shapes(other)
    homes = tuple(m.home for m in mixtures.values())
    changed = {n for n, shape in whole.items() if now.get(n) != shape}
    if now.keys() - whole.keys() or not all(name.startswith(homes) for name in changed):
        return set()
    return {name for name in mixtures if count(other, name) == field.value}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}


def count(model: nn.Module, mixture: str) -> int:
    """How many experts a model that was just built has in a mixture."""
    try:
        module: Any = model.get_submodule(mixture)
    except AttributeError:
        return 0
    return int(module.num_experts) if is_fused(module) else len(module._modules)


def _resized(
    model: PreTrainedModel,
    mixtures: Mapping[str, Mixture],
    path: tuple[str, ...],
    name: str,
    kept: Mapping[str, int],
) -> Field:
    """The field that says how many experts some mixtures have."""
    numbers = set(kept.values())
    if len(numbers) == 1:
        return Field(path, name, numbers.pop())
    layers = {_layer(m): {name: n} for m, n in kept.items()}
    field = Field(path, PER_LAYER, layers)
    try:
        other = built(model, [field])
        if None not in layers and all(count(other, m) == n for m, n in kept.items()):
            return field
    except Exception:  # as above
        pass
    raise ConfigError(
        f"{type(model).__name__} counts the experts of all its layers with one number, {name}, so "
        "that no layer can keep fewer than another: pass expert_budget='layer'"
    )


def _layer(mixture: str) -> int | None:
    """The number of the layer that a mixture belongs to."""
    return next((int(part) for part in mixture.split(".") if part.isdigit()), None)
