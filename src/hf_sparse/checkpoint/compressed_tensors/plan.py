"""What becomes of each parameter of an old checkpoint: its name now, and its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...core.errors import CheckpointError
from ...core.logging import progress_bar
from ...core.patterns import Unstructured
from ...formats import Dense, choose_format
from ...layers.default_dense import default_dense
from ...layers.experts import SparseExperts, tied_experts, unfuse
from ...layers.select import Target, select_targets
from ..headers import PackedLayer
from .parameters import MergedParameter, Parameter, StoredParameter
from .skeleton import is_needed, may_be_missing, renaming


@dataclass(frozen=True)
class Number:
    """What `SparseExperts` has under a fused weight's name: how many experts there are."""

    experts: int

    def dense(self) -> Tensor:
        return torch.tensor([self.experts])


@dataclass(frozen=True)
class Item:
    """A parameter under its name in the model; with a layer if it is to be packed.

    `bytes` is what it takes in the result, at most.
    """

    name: str
    parameter: Parameter | Number
    bytes: int
    layer: PackedLayer | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What is to be written, by key."""
        dense = self.parameter.dense()
        if self.layer is None:
            return {self.name: dense}
        packed = self.layer.format.pack(self.layer.axes.matrix(dense))
        return {f"{self.layer.name}.{key}": value for key, value in packed.items()}


def plan(folder: Path, model: PreTrainedModel, parameters: Sequence[StoredParameter]) -> list[Item]:
    """Name every parameter, check what is stored of it, and choose its format."""
    left_dense = default_dense(model)
    named, split = _named(model, parameters)
    left_dense |= _take_apart(model, split)
    expected: dict[str, Tensor] = dict(model.state_dict())
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    chosen = select_targets(model, None, None, left_dense).targets
    targets = {f"{target.name}.weight": target for target in chosen}
    items: dict[str, Item] = {}
    with progress_bar(len(named), "Checking") as bar:
        for name, parameter in named.items():
            bar.update()
            if name not in expected:
                raise parameter.origin.error(f"is of no parameter of {type(model).__name__}")
            if parameter.shape != tuple(expected[name].shape):
                raise parameter.origin.error(
                    f"is of a weight of shape {parameter.shape}, {type(model).__name__} has "
                    f"{tuple(expected[name].shape)} there"
                )
            items[name] = _item(name, parameter, targets.get(name))
    numbers = {f"{name}.{local}" for name in split for local in _projections(model, name)}
    there = items.keys() | numbers
    for name in expected:
        found = name in there or tied.get(name) in there
        if not found and not may_be_missing(model, name):
            raise CheckpointError(f"{folder}: no file has {name}")
    for name in split:
        _finish_experts(name, _projections(model, name), items, named)
    return [item for name, item in items.items() if tied.get(name) not in items]


def _named(
    model: PreTrainedModel, parameters: Sequence[StoredParameter]
) -> tuple[dict[str, Parameter], list[str]]:
    """The parameters by their names in memory, and the fused experts of which it has the layers."""
    rename = renaming(model, dict(model.state_dict()))
    found: dict[str, list[StoredParameter | None]] = {}
    split: dict[str, None] = {}
    for parameter in parameters:
        place = rename(parameter)
        if place is None and not is_needed(model, parameter.names[0]):
            continue
        if place is None:
            raise parameter.origin.error(f"is of no parameter of {type(model).__name__}")
        parts = found.setdefault(place.name, [None] * place.parts)
        if parts[place.part] is not None:
            raise parameter.origin.error(f"is a second {place.name}")
        parts[place.part] = parameter
        if place.experts is not None:
            split[place.experts] = None
    named: dict[str, Parameter] = {}
    for name, parts in found.items():
        there = [part for part in parts if part is not None]
        if len(there) < len(parts):
            raise there[0].origin.error(f"is a part of {name}, whose other part no file has")
        named[name] = there[0] if len(there) == 1 else MergedParameter(there, stacked=False)
    return named, list(split)


def _take_apart(model: PreTrainedModel, split: Sequence[str]) -> dict[str, str]:
    """Make layers of fused experts that the files have one by one; gives those that stay dense."""
    tied = tied_experts(model)
    for name in split:
        unfuse(model, model.get_submodule(name))
    return {
        layer: "its weight is tied"
        for name in tied.intersection(split)
        for layer, _ in model.get_submodule(name).named_modules(prefix=name)
    }


def _projections(model: PreTrainedModel, experts: str) -> dict[str, int]:
    """The names of the fused weights of experts that are layers now, with the number of experts."""
    module = model.get_submodule(experts)
    assert isinstance(module, SparseExperts)
    return {local: module.num_experts for local, _ in module.named_buffers(recurse=False)}


def _finish_experts(
    name: str,
    projections: Mapping[str, int],
    items: dict[str, Item],
    named: Mapping[str, Parameter],
) -> None:
    """Add what `SparseExperts` has beside its layers; without a packed one they stay fused."""
    layers = {
        local: [f"{name}.{expert}.{local}.weight" for expert in range(number)]
        for local, number in projections.items()
    }
    packed = any(items[key].layer for keys in layers.values() for key in keys)
    for local, keys in layers.items():
        fused = f"{name}.{local}"
        if packed:
            items[fused] = Item(fused, Number(len(keys)), 8)
        else:
            whole = MergedParameter([named[key] for key in keys], stacked=True)
            for key in keys:
                del items[key]
            items[fused] = Item(fused, whole, whole.dense_bytes)


def _item(name: str, parameter: Parameter, target: Target | None) -> Item:
    """The parameter under its name, packed if it is a linear layer's weight and gets smaller."""
    if not parameter.sparse:
        return Item(name, parameter, parameter.dense_bytes)
    dense = parameter.dense()  # checks it
    if target is not None:
        weight = target.axes.matrix(dense)
        fmt = choose_format(weight, Unstructured(0.0), "auto")
        if not isinstance(fmt, Dense):
            layer = PackedLayer(target.name, fmt, target.shape, target.axes)
            return Item(name, parameter, parameter.bytes, layer)
    return Item(name, parameter, parameter.dense_bytes)
