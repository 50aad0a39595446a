"""What an adapter makes of a layer: found with PEFT's own merging, on a stand-in for the layer."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...core.errors import AdapterError
from ...layers import SparseLinear
from ...layers.conv import empty_dense_layer
from ..peft_hooks import check_inputs_stay


class Adapted(NamedTuple):
    """A model's layers that an adapter changes, by their names in the base model."""

    sparse: dict[str, BaseTunerLayer]
    others: dict[str, BaseTunerLayer]


class MergedLayer(NamedTuple):
    """What PEFT's merging gives for a layer; both in the layer's dtype, the weight (out, in)."""

    weight: Tensor
    bias: Tensor | None


def find_adapted(model: Any) -> Adapted:
    """The layers of a model that have an adapter, or an AdapterError that says why it has none
    that can be merged."""
    if not isinstance(model, PeftModel):
        raise AdapterError(
            f"merge_adapter takes a peft.PeftModel, found {type(model).__name__}: make one with "
            "get_peft_model or PeftModel.from_pretrained"
        )
    if model.active_peft_config.is_prompt_learning:
        raise AdapterError(
            f"an adapter of type {model.peft_type} adds tokens, not weights: there is nothing to "
            "merge, save it beside the sparse model"
        )
    base = model.get_base_model()
    if not any(isinstance(module, SparseLinear) for module in base.modules()):
        raise AdapterError(
            f"{type(base).__name__} has no sparse layer: call merge_and_unload() of the model"
        )
    found = {n: m for n, m in base.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, tuner in found.items():
        _check_state(name, tuner)
    sparse = {n: t for n, t in found.items() if isinstance(t.get_base_layer(), SparseLinear)}
    return Adapted(sparse, {n: t for n, t in found.items() if n not in sparse})


def _check_state(name: str, tuner: BaseTunerLayer) -> None:
    if tuner.merged:
        raise AdapterError(
            f"layer {name} has adapters merged already ({', '.join(tuner.merged_adapters)}): call "
            "unmerge_adapter() of the model first"
        )
    if tuner.disable_adapters:
        raise AdapterError(
            f"the adapters are disabled (layer {name}): call enable_adapter_layers() of the model"
        )
    check_inputs_stay(name, tuner)
    base = tuner.get_base_layer()
    if isinstance(base, SparseLinear) and base.is_offloaded():
        raise AdapterError(
            f"layer {name} is offloaded: load the model without offloading to merge an adapter"
        )


def merged_layer(name: str, tuner: Any) -> MergedLayer | None:
    """Weight and bias of a sparse layer with its active adapters merged; the layer is unchanged.

    None if no active adapter has a part in it.

    Raises:
        AdapterError: PEFT can't merge this kind of adapter, or this one; names the layer.
    """
    sparse = tuner.get_base_layer()
    assert isinstance(sparse, SparseLinear)
    dense = empty_dense_layer(sparse)
    dense.weight = nn.Parameter(sparse.weight.clone(), requires_grad=False)
    if sparse.bias is not None:
        dense.bias = nn.Parameter(sparse.bias.detach().clone(), requires_grad=False)
    tuner.base_layer = dense
    try:
        _merge(name, tuner)
        if not tuner.merged:
            return None
    finally:
        tuner.base_layer = sparse
        tuner.merged_adapters.clear()
    bias = None if dense.bias is None else dense.bias.detach()
    return MergedLayer(dense.weight.detach().view(sparse.shape), bias)


def check_mergeable(name: str, tuner: BaseTunerLayer) -> None:
    """Merge into a copy of a layer: raises what `merged_layer` does."""
    _merge(name, copy.deepcopy(tuner))


def _merge(name: str, tuner: Any) -> None:
    try:
        with torch.no_grad():
            tuner.merge(safe_merge=True)
    except Exception as error:
        raise AdapterError(
            f"layer {name}: PEFT can't merge its adapter ({type(tuner).__module__}): {error}"
        ) from error


def stand_in(tuner: nn.Module, layer: SparseLinear) -> None:
    """Let an adapted layer compute as another one."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = layer(x)
        return y

    tuner.forward = forward  # type: ignore[method-assign]


def step_back(tuner: nn.Module) -> None:
    """Undo `stand_in`."""
    tuner.__dict__.pop("forward", None)
