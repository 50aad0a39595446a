"""The sparse layers of a checkpoint: built empty before its tensors are loaded, checked after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from ..core.errors import CheckpointError
from ..core.low_rank import KEY_A, KEY_B, LowRank
from ..layers import SparseLinear
from ..layers.axes import Axes
from ..layers.conv import sparse_class
from ..layers.experts import is_fused, unfuse
from ..layers.held import buffer_name
from ..layers.prunable import is_prunable
from ..layers.replace import ModuleParents
from .headers import PackedLayer
from .offload import as_held, leave_in_files, read


def build_layers(
    model: nn.Module, described: Mapping[str, PackedLayer], dtype: torch.dtype
) -> dict[str, PackedLayer]:
    """Put empty sparse layers where the checkpoint has packed ones; all is on meta yet.

    Args:
        model: dense; fused experts that the checkpoint has layer by layer become layers.
        described: the checkpoint's layers by their names in it, as `read_layers` gives them.
        dtype: that the model is loaded in.

    Returns:
        Those that the model has, by their names in it.

    Raises:
        CheckpointError: a layer is another one than the model's; names file and layer.
    """
    base = getattr(model, "base_model_prefix", "")
    prefix = f"{base}." if base else ""
    _unfuse_described(model, described, prefix)
    modules, parents = dict(model.named_modules()), ModuleParents(model)
    built: dict[str, PackedLayer] = {}
    for name, layer in described.items():
        own = next((n for n in _spellings(name, prefix) if n in modules), None)
        if own in built:
            raise CheckpointError(
                f"{layer.file}: {layer.name} and {built[own].name} are one module, described twice"
            )
        if own is not None:
            parents.replace(modules[own], _empty_layer(modules[own], layer, dtype))
            built[own] = layer
    _untie(model, built)
    return built


def finish_layers(model: nn.Module, layers: Mapping[str, PackedLayer]) -> None:
    """Check the tensors that were loaded and hand them to kernels, one layer after the other.

    Raises:
        CheckpointError: their contents are not what the layer's format calls for.
    """
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        module = modules[name]
        assert isinstance(module, SparseLinear)
        if module.is_offloaded():
            leave_in_files(module, layer)
        with align_module_device(module):
            if not any(tensor.is_meta for tensor in module.packed.values()):
                _finish_stored(module, layer)
            _check(module, layer)
        module.trust()
        module.resolve()


def _check(module: SparseLinear, layer: PackedLayer) -> None:
    """Raise a CheckpointError unless what was loaded agrees; there is nothing to check on meta."""
    if not any(tensor.is_meta for tensor in module.packed.values()):
        layer.check(module.packed, module.low_rank)


def _empty_layer(module: nn.Module, layer: PackedLayer, dtype: torch.dtype) -> SparseLinear:
    """What takes a dense layer's place: a sparse one on meta, with the checkpoint's shapes."""
    weight = getattr(module, "weight", None)
    expected = tuple(weight.shape) if isinstance(weight, torch.Tensor) else None
    axes = Axes.of(module)
    same = expected == axes.own_shape(layer.shape) and layer.axes == axes
    if not same or not is_prunable(module):
        raise CheckpointError(
            f"{layer.file}: {layer.name}.weight is packed from shape {layer.shape}, the model has "
            f"{type(module).__name__} with weight {expected} there"
        )
    if module.bias is not None and not layer.has_bias:
        raise CheckpointError(f"{layer.file}: {layer.name}.bias is missing")
    tensors = {
        key: torch.empty(shape, dtype=stored, device="meta")
        for key, (shape, stored) in layer.layout.items()
    }
    low_rank = LowRank(tensors.pop(KEY_B), tensors.pop(KEY_A)) if layer.low_rank else None
    bias: Any = module.bias
    cls = sparse_class(axes)
    sparse = cls(layer.format, tensors, layer.shape, dtype, bias, axes, low_rank, layer.threshold)
    # Some models' initialisation reads weights of layers that are there: before `finish_layers`.
    sparse.distrust(partial(_check, sparse, layer))
    # transformers would otherwise unpack each layer to initialise what isn't missing.
    sparse._is_hf_initialized = True  # type: ignore[assignment]
    return sparse


def _spellings(name: str, prefix: str) -> tuple[str, str, str]:
    """A base model reads a head model's checkpoint and the other way round."""
    return name, name.removeprefix(prefix), prefix + name


def _unfuse_described(model: nn.Module, described: Iterable[str], prefix: str) -> None:
    """Experts that the checkpoint has layer by layer become layers; all is on meta yet."""
    fused = {n: m for n, m in model.named_modules() if n and is_fused(m)}
    parents = {name.rsplit(".", 2)[0] for name in described if name.count(".") > 1}
    wanted = {own for parent in parents for own in _spellings(parent, prefix) if own in fused}
    for name in wanted:
        unfuse(model, fused[name])


def _untie(model: nn.Module, built: Mapping[str, PackedLayer]) -> None:
    """What a config calls tied, though its checkpoint held two weights, was pruned as two."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for pair in list(ties.items()):
        if any(key.removesuffix(".weight") in built for key in pair):
            del ties[pair[0]]


def _finish_stored(module: SparseLinear, layer: PackedLayer) -> None:
    """Replace tensors that were loaded to the CPU by equal ones with files of their own.

    transformers maps a file once, and every page of it that was read stays resident until the last
    of its tensors is gone, which embeddings never are. A mapping per tensor ends with the tensor:
    then only one layer at a time is resident both as stored and in its kernel's form.
    """
    low_rank = module.low_rank
    factors = low_rank.tensors() if low_rank is not None else {}
    for key, loaded in (module.packed | factors).items():
        on_cpu, dtype = loaded.device.type == "cpu", module.weight_dtype
        tensor = read(layer, key, dtype) if on_cpu else loaded
        if key == "weight" or key in factors:
            tensor = as_held(tensor, dtype)
        setattr(module, buffer_name(key), tensor)
