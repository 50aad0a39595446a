"""Sparse layers whose tensors stay in the checkpoint's files until they are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor

from ..core.low_rank import KEY_A, KEY_B
from ..layers import SparseLinear
from ..layers.held import buffer_name
from .headers import PackedLayer


class FileTensors(Mapping[str, Tensor]):
    """A layer's tensors by the names that it has for them, read anew at each access.

    Args:
        layer: in its files.
        dtype: of the layer's weight.
        others: what else accelerate brings in for the layer, its bias.
    """

    def __init__(
        self, layer: PackedLayer, dtype: torch.dtype, others: Mapping[str, Tensor]
    ) -> None:
        self._layer, self._dtype, self._others = layer, dtype, others
        factors = (KEY_A, KEY_B) if layer.low_rank else ()
        self._keys = {buffer_name(key): key for key in (*layer.format.specs(layer.shape), *factors)}

    def __getitem__(self, name: str) -> Tensor:
        key = self._keys.get(name)
        return self._others[name] if key is None else read(self._layer, key, self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def read(layer: PackedLayer, key: str, dtype: torch.dtype) -> Tensor:
    """A tensor of a layer of `dtype`: values as stored if that represents them exactly."""
    tensor = layer.read(key)
    return as_held(tensor, dtype) if key in ("weight", KEY_A, KEY_B) else tensor


def as_held(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values for a layer of `dtype`: as they are if that represents them exactly."""
    exact = torch.promote_types(values.dtype, dtype) == dtype
    return values if exact or not values.is_floating_point() else values.to(dtype)


def leave_in_files(module: SparseLinear, layer: PackedLayer) -> None:
    """Have accelerate's hook of an offloaded layer bring its tensors in from the files."""
    hook: Any = module._hf_hook
    tensors = FileTensors(layer, module.weight_dtype, hook.weights_map or {})
    for name in tensors:
        setattr(module, name, tensors[name].to("meta"))
    add_hook_to_module(
        module,
        AlignDevicesHook(
            execution_device=hook.execution_device,
            offload=True,
            io_same_device=hook.io_same_device,
            weights_map=tensors,
            offload_buffers=True,
            place_submodules=hook.place_submodules,
            skip_keys=hook.skip_keys,
        ),
    )
