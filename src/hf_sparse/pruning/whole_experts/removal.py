"""Experts let go: from the mixtures, from what has an entry for each expert, and from the config.

What that is shows in two models on the meta device, one built from the config as it is and one from
the config with fewer experts: a tensor that is shorter on one axis has its entries of the experts
that are left there, and a module's number that differs is the new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ...core.errors import ConfigError
from ...layers.experts import SparseExperts
from ...layers.mixtures import Mixture
from .counts import Field, built, count, find_fields, tensors_of

PLAIN_VALUES = (bool, int, float, str, tuple, list, type(None))


@dataclass(frozen=True)
class Removal:
    """How a model changes when its mixtures have fewer experts; nothing is changed yet.

    Attributes:
        fields: of the config.
        entries: by a tensor's name, the mixture for whose experts it has entries, and their axis.
        attributes: of modules, by the names of module and attribute.
    """

    fields: Sequence[Field]
    entries: Mapping[str, tuple[str, int]]
    attributes: Mapping[tuple[str, str], Any]

    @classmethod
    def of(
        cls, model: PreTrainedModel, mixtures: Mapping[str, Mixture], kept: Mapping[str, int]
    ) -> Removal:
        """What depends on how many experts are left.

        Args:
            model: with all its experts.
            mixtures: all of it, by name.
            kept: how many of each are to be left.

        Raises:
            ConfigError: the config can't say so, or a model built from it wouldn't take what would
                be left of this one.
        """
        fields = find_fields(model, mixtures, kept)
        whole, other = built(model), built(model, fields)
        for name, number in kept.items():
            if count(other, name) != number:
                raise _not_described(model, f"it has {count(other, name)} experts in {name}")
        found = cls(fields, _entries(model, whole, other, mixtures, kept), _changed(whole, other))
        _check_strictly(model, other, mixtures, kept, found.entries)
        return found

    def apply(
        self,
        model: PreTrainedModel,
        mixtures: Mapping[str, Mixture],
        kept: Mapping[str, Sequence[int]],
    ) -> None:
        """Let all experts go but those numbered in `kept`, in place."""
        for name, (owner, axis) in self.entries.items():
            _shorten(model, name, axis, kept[owner], len(mixtures[owner].experts))
        for name, mixture in mixtures.items():
            mixture.keep(kept[name])
        for (name, attribute), value in self.attributes.items():
            module = model.get_submodule(name)
            if not isinstance(module, SparseExperts):  # that has done it itself
                setattr(module, attribute, value)
        configs = list(_configs(model))
        for field in self.fields:
            held = field.holder(model.config)
            before = vars(held).get(field.name)
            for config in configs:
                if type(config) is type(held) and vars(config).get(field.name) == before:
                    setattr(config, field.name, field.value)


def _entries(
    model: nn.Module,
    whole: nn.Module,
    other: nn.Module,
    mixtures: Mapping[str, Mixture],
    kept: Mapping[str, int],
) -> dict[str, tuple[str, int]]:
    """The tensors beside the experts that have entries for them."""
    found: dict[str, tuple[str, int]] = {}
    experts = tuple(f"{name}." for name in mixtures)
    tensors = {n: t for n, t in tensors_of(model).items() if not n.startswith(experts)}
    for name, tensor in tensors.items():
        near = name.startswith(tuple(m.home for m in mixtures.values()))
        if near and tensor.ndim and not tensor.is_floating_point():
            raise ConfigError(
                f"{name} holds whole numbers, which may be those of experts: a router that looks "
                "experts up can't do without some, so leave experts out"
            )
    now = tensors_of(other)
    for name, before in tensors_of(whole).items():
        if name not in tensors or now[name].shape == before.shape:
            continue
        shape, shorter = tuple(before.shape), tuple(now[name].shape)
        beside = [m for m in mixtures.values() if name.startswith(m.home)]
        longest = max(len(m.home) for m in beside)
        owner, *more = (m for m in beside if len(m.home) == longest)
        removed = len(owner.experts) - kept[owner.name]
        axes = [i for i, (a, b) in enumerate(zip(shape, shorter, strict=True)) if a != b]
        fits = len(axes) == 1 and shape[axes[0]] - shorter[axes[0]] == removed
        offloaded = tensors[name].is_meta
        if more or not fits or shape[axes[0]] < len(owner.experts) or offloaded:
            raise ConfigError(
                f"{name} has the shape {shape}, and {shorter} with {removed} experts fewer: "
                f"{'it is offloaded' if offloaded else 'nothing tells which are whose'}, so leave "
                "experts out"
            )
        found[name] = owner.name, axes[0]
    return found


def _changed(whole: nn.Module, other: nn.Module) -> dict[tuple[str, str], Any]:
    """Plain attributes of modules that depend on how many experts there are."""
    now = dict(other.named_modules())
    return {
        (name, attribute): vars(now[name])[attribute]
        for name, module in whole.named_modules()
        for attribute, value in vars(module).items()
        if name in now
        and isinstance(value, PLAIN_VALUES)
        and vars(now[name]).get(attribute, value) != value
    }


def _check_strictly(
    model: PreTrainedModel,
    other: PreTrainedModel,
    mixtures: Mapping[str, Mixture],
    kept: Mapping[str, int],
    entries: Mapping[str, tuple[str, int]],
) -> None:
    """Would the model that the changed config builds load what will be left, key by key?"""
    left: dict[str, tuple[int, ...]] = {}
    fused = tuple(f"{n}." for n, m in mixtures.items() if isinstance(m.container, SparseExperts))
    gone = tuple(
        f"{name}.{expert}."
        for name, mixture in mixtures.items()
        for expert in list(mixture.container._modules)[kept[name] :]
    )
    for key, tensor in model.state_dict().items():
        if key.startswith(fused):
            continue
        if not key.startswith(gone):
            left[key] = tuple(tensor.shape)
        if key in entries:
            mixture, axis = entries[key]
            shape = list(tensor.shape)
            shape[axis] -= len(mixtures[mixture].experts) - kept[mixture]
            left[key] = tuple(shape)
    left |= {k: tuple(t.shape) for k, t in other.state_dict().items() if k.startswith(fused)}
    empty = {key: torch.empty(shape, device="meta") for key, shape in left.items()}
    try:
        other.load_state_dict(empty, strict=True, assign=True)
    except RuntimeError as error:
        raise _not_described(model, " ".join(str(error).split())[:300]) from None


def _not_described(model: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"what would be left of {type(model).__name__} isn't the model that its config describes "
        f"with fewer experts: {why}. Adapters have to be merged or removed first; otherwise leave "
        "experts out"
    )


def _shorten(model: nn.Module, name: str, axis: int, kept: Sequence[int], experts: int) -> None:
    """Keep some experts' entries of a tensor, and what follows after those of all experts."""
    owner, _, local = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor: Tensor = getattr(module, local)
    rest = range(experts, tensor.shape[axis])
    index = torch.tensor([*kept, *rest], device=tensor.device)
    shorter = tensor.detach().index_select(axis, index)
    if isinstance(tensor, nn.Parameter):
        setattr(module, local, nn.Parameter(shorter, requires_grad=tensor.requires_grad))
    else:
        setattr(module, local, shorter)


def _configs(model: nn.Module) -> Iterator[PretrainedConfig]:
    """Each config that a model or a module in it has, and those inside them, once."""
    found: dict[int, PretrainedConfig] = {}
    pending: list[Any] = [vars(module).get("config") for module in model.modules()]
    while pending:
        config = pending.pop()
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            pending += vars(config).values()
    yield from found.values()
