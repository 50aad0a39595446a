"""The three ways in which a sparse layer holds its weight: `Stored`, `Resolved` or `Trained`.

The tensors are the layer's own, buffers or parameters, so that whatever moves, loads, saves or
counts a module's tensors finds them. A way knows how they are registered, and what to do with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..core.low_rank import KEY_A, KEY_B, LowRank
from ..formats import Format
from ..formats.base import Packed
from ..kernels import Kernel
from ..kernels.reference import sparse_linear

# `weight` itself is a property, so the tensor with the values needs a name of its own.
VALUES = "weight_values"
FACTORS = (KEY_A, KEY_B)


def buffer_name(key: str) -> str:
    """The tensor of a layer, and key of `state_dict`, for a format's local key."""
    return VALUES if key == "weight" else key


@dataclass(frozen=True)
class PackedWeight:
    """All that is stored of a weight W ~ S + B A.

    Attributes:
        format: of S.
        packed: the format's tensors, by local keys.
        low_rank: B and A, or None.
    """

    format: Format
    packed: Packed
    low_rank: LowRank | None = None

    def to(self, dtype: torch.dtype) -> PackedWeight:
        """A copy of floating-point values and factors in another dtype; companions as they are."""
        packed = {**self.packed, "weight": self.packed["weight"].to(dtype, copy=True)}
        factors = self.low_rank
        if factors is not None:
            factors = LowRank(factors.b.to(dtype, copy=True), factors.a.to(dtype, copy=True))
        return PackedWeight(self.format, packed, factors)

    def on_meta(self) -> PackedWeight:
        """The same without contents."""
        packed = {key: tensor.to("meta") for key, tensor in self.packed.items()}
        factors = self.low_rank
        if factors is not None:
            factors = LowRank(factors.b.to("meta"), factors.a.to("meta"))
        return PackedWeight(self.format, packed, factors)

    def named_tensors(self) -> dict[str, Tensor]:
        """The packed tensors by the names that a layer has for them."""
        return {buffer_name(key): tensor for key, tensor in self.packed.items()}

    def dense(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """S + B A, (out, in)."""
        weight = self.format.unpack(self.packed, shape, dtype)
        return weight if self.low_rank is None else self.low_rank.added_to(weight)


class Stored:
    """The stored form in persistent buffers; the reference path multiplies.

    Args:
        keys: the format's local keys.
    """

    kernel: Kernel | None = None

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = tuple(keys)

    def register(self, layer: nn.Module, name: str, tensor: Tensor) -> None:
        """Make a tensor the layer's."""
        layer.register_buffer(name, tensor)

    def tensors(self, layer: nn.Module) -> Packed:
        """The stored form as it is held, by local keys: values that are trained have a gradient."""
        return {key: getattr(layer, buffer_name(key)) for key in self._keys}

    def packed(self, layer: nn.Module) -> Packed:
        """The stored form by local keys, without gradients."""
        return {key: tensor.detach() for key, tensor in self.tensors(layer).items()}

    def dense(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """The packed part of the weight, (out, in)."""
        weight: Tensor = layer.format.unpack(self.tensors(layer), layer.shape, dtype)
        return weight

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """The product with the packed part, and the bias."""
        return sparse_linear(x, layer.bias, layer.format, layer.shape, self.tensors(layer))


class Unchecked(Stored):
    """As a file has it: the contents are checked before anything is computed of them.

    Args:
        keys: the format's local keys.
        check: raises unless the layer's contents agree.
    """

    def __init__(self, keys: Iterable[str], check: Callable[[], None]) -> None:
        super().__init__(keys)
        self._check = check

    def dense(self, layer: Any, dtype: torch.dtype) -> Tensor:
        self._check()
        return super().dense(layer, dtype)

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        self._check()
        return super().linear(layer, x)


class Trained(Stored):
    """The stored form with the values, and the low-rank part, as parameters."""

    def register(self, layer: nn.Module, name: str, tensor: Tensor) -> None:
        if name in (VALUES, *FACTORS):
            layer.register_parameter(name, nn.Parameter(tensor))
        else:
            layer.register_buffer(name, tensor)


class Resolved:
    """In the form of a kernel, whose tensors are the only ones: buffers that are not saved.

    Args:
        kernel: what multiplies.
        values_dtype: dtype of the values as they are stored.
    """

    def __init__(self, kernel: Kernel, values_dtype: torch.dtype) -> None:
        self.kernel = kernel
        self._values_dtype = values_dtype

    def register(self, layer: nn.Module, name: str, tensor: Tensor) -> None:
        """Make a tensor the layer's; a low-rank part is saved, as it is in no kernel."""
        layer.register_buffer(name, tensor, persistent=name in FACTORS)

    def packed(self, layer: Any) -> Packed:
        """The stored form, made anew."""
        return self.kernel.packed(layer.format, self._values_dtype)

    def dense(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """The packed part of the weight, (out, in)."""
        return self.kernel.weight(dtype)

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """The product with the packed part, and the bias."""
        return self.kernel.linear(x, layer.bias)


Held: TypeAlias = Stored | Trained | Resolved
