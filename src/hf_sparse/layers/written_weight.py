"""What `SparseLinear.weight` gives: the unpacked weight, with a way back into its layer.

Code that changes a layer's weight does so in place: `layer.weight.data += delta`. On a weight that
was unpacked a moment ago this would be lost without a word. So whatever shares memory with the
unpacked weight remembers where it came from, and hands the whole of it to the layer once something
was written into it. Whether something was, torch tells by the tensor's version, which every
operation that writes to a tensor counts up, whatever its name and in whichever argument it stands.

What a write means: the layer has that weight from then on. It stays packed as it is where the new
weight is 0 wherever the old one is, and becomes dense otherwise, with a warning. Where a weight
can't be kept (in training, offloaded, on meta, of another shape), where it would be trained and
in memory that torch doesn't watch (NumPy's arrays, which are read-only here), there is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core.errors import AdapterError, FormatError, TrainingError
from ..formats import Dense
from .held import PackedWeight

MERGED = (
    "A weight that does not fit its packed form was written into a sparse layer, as PEFT's merge() "
    "and merge_and_unload() do: the layer is {} now. To merge an adapter into a model that stays "
    "sparse call hf_sparse.merge_adapter(model) instead."
)

# Is given all of a weight, and gives the one that the layer holds instead, if it is another.
Take: TypeAlias = Callable[[Tensor], Tensor | None]

# `tensor.data = other` gives a tensor other memory, which its version doesn't tell.
_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Origin:
    """The unpacked weight that a tensor is a view of, and what takes it when it has changed."""

    whole: Tensor
    take: Take

    def changed(self) -> None:
        """Hand the weight over; it is then what the layer has."""
        held = self.take(self.whole.detach().as_subclass(Tensor))
        if held is not None:
            self.whole.data.copy_(held)


class UnpackedWeight(torch.Tensor):
    """A tensor like any other, but for what is written into it. Results of operations are plain."""

    # transformers gives weights whose names a checkpoint lacks random values, but not these.
    _is_hf_initialized = True

    _origin: _Origin

    @staticmethod
    def of(weight: Tensor, take: Take) -> Tensor:
        """`weight` itself; `take` is called with all of it after every write."""
        return _connected(weight, _Origin(weight, take))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        own = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, UnpackedWeight)]
        with torch._C.DisableTorchFunctionSubclass():
            versions = [tensor._version for tensor in own]
            result = func(*args, **kwargs)
            for tensor, version in zip(own, versions, strict=True):
                whole = tensor is tensor._origin.whole
                if tensor._version != version or (whole and func == _SET_DATA):
                    tensor._origin.changed()
                if whole and tensor.is_leaf and tensor.requires_grad:
                    tensor.requires_grad_(False)
                    raise TrainingError(
                        "the weight of a sparse layer is unpacked anew whenever it is read and "
                        "can't be trained itself: call "
                        "hf_sparse.training.prepare_for_training(model) to train what is kept"
                    )
            if isinstance(result, np.ndarray):
                result.flags.writeable = False
            memories = {_memory(tensor): tensor._origin for tensor in own}
            memories.pop(0, None)  # meta tensors have none

            def connect(tensor: Tensor) -> Tensor:
                origin = memories.get(_memory(tensor)) if type(tensor) is Tensor else None
                return tensor if origin is None else _connected(tensor, origin)

            return tree_map_only(Tensor, connect, result)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        """`nn.Parameter(weight)` sets it, and gets an ordinary parameter."""
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        self._is_param = value


def _connected(tensor: Tensor, origin: _Origin) -> Tensor:
    connected = tensor.as_subclass(UnpackedWeight)
    if origin.whole is tensor:
        origin = _Origin(connected, origin.take)
    connected._origin = origin
    return connected


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def take(layer: Any, value: Tensor | None) -> Tensor | None:
    """Have a sparse layer hold a weight that was written from outside.

    Returns:
        The weight that it had before others were written over it, if `value` is that up to
        rounding: then the layer has it again, packed as it was.

    Raises:
        AdapterError: the layer's tensors are offloaded, or trained.
        FormatError: it is no tensor of that shape, or the layer or it is on meta.
    """
    if not isinstance(value, Tensor):
        raise FormatError(f"the weight is a {type(value).__name__}, expected a tensor")
    if layer.trains_values:
        raise AdapterError(
            "a weight was written into a sparse layer whose values are trained: call "
            "hf_sparse.training.finish_training(model) first"
        )
    if layer.is_offloaded():
        raise AdapterError(
            "a weight was written into a sparse layer that is offloaded, where it would be "
            "lost: load the model without offloading to merge an adapter"
        )
    shape = layer.weight_shape
    if value.shape != shape:
        raise FormatError(f"the weight has shape {tuple(value.shape)}, expected {shape}")
    empty = any(tensor.is_meta for tensor in layer.packed.values())
    if empty and value.is_meta:
        return None  # there is nothing to hold, as in a dense layer on meta
    if empty or value.is_meta:
        which = "written into a sparse layer that" if empty else "that was written"
        raise FormatError(f"a weight {which} is on meta, without contents: load them first")
    current, before = layer.matrix, layer.written_over
    value = value.detach().as_subclass(Tensor).to(current).reshape(layer.shape)
    if torch.equal(value, current):
        return None
    resolved = layer.kernel is not None
    if before is not None and _equal_but_rounding(
        value, current, before.dense(layer.shape, layer.weight_dtype)
    ):
        _hold(layer, before, resolved)
        whole: Tensor = layer.matrix.view(shape)
        return whole
    layout = layer.format.layout
    if layer.rank or bool(value[current == 0].any()):
        layout = Dense()
    if layout != layer.format:
        lost = "dense" if isinstance(layout, Dense) else "no longer quantised"
        warnings.warn(MERGED.format(lost), stacklevel=3)
    before = before or layer.stored
    _hold(layer, PackedWeight(layout, layout.pack(value)), resolved)
    layer.written_over = before
    return None


def _hold(layer: Any, weight: PackedWeight, resolved: bool) -> None:
    layer.hold(weight)
    if resolved:
        layer.resolve()


def _equal_but_rounding(value: Tensor, current: Tensor, old: Tensor) -> bool:
    """Is `value` the old weight, up to what adding to it, and subtracting again, has rounded?"""
    size = current.abs().max() + old.abs().max()
    return bool((value - old).abs().max() <= 8 * torch.finfo(old.dtype).eps * size)
