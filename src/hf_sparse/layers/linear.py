"""`SparseLinear`: an `nn.Linear` that holds only the packed weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Format
from ..formats.base import Packed
from ..kernels.reference import sparse_linear

# `weight` itself is a property, so the buffer with the values needs a name of its own.
VALUES = "weight_values"


class SparseLinear(nn.Linear):
    """A linear layer whose weight is packed; takes the place of a `Linear` or a `Conv1D`.

    It is an `nn.Linear` so that PEFT and whatever else asks `isinstance(layer, nn.Linear)` treats
    it as one. `.weight` can be read, at the price of unpacking it; it can't be assigned.

    Args:
        fmt: storage format of the packed tensors.
        packed: the format's tensors, `weight` and companions; meta tensors before loading.
        shape: (out_features, in_features).
        dtype: dtype of `.weight` and of the product's weight. The stored values may be narrower:
            a bf16 checkpoint loaded in fp32 keeps bf16 values, which is exact.
        bias: bias parameter to adopt, shape (out_features,), or None.
        transposed: the layer replaces a `Conv1D`, whose dense weight is (in, out).
    """

    def __init__(
        self,
        fmt: Format,
        packed: Packed,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        transposed: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.format = fmt
        self.transposed = transposed
        self.weight_dtype = dtype
        self._keys = tuple(packed)
        for key, tensor in packed.items():
            self.register_buffer(VALUES if key == "weight" else key, tensor)
        self.bias = bias  # type: ignore[assignment]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def packed(self) -> Packed:
        """The format's tensors by their local keys; no copies."""
        names = {key: VALUES if key == "weight" else key for key in self._keys}
        return {key: self._buffers[name] for key, name in names.items()}  # type: ignore[misc]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight, shape (out, in), unpacked anew at each access."""
        return self.format.unpack(self.packed, self.shape, self.weight_dtype)

    def forward(self, input: Tensor) -> Tensor:
        return sparse_linear(input, self.bias, self.format, self.shape, self.packed)

    def extra_repr(self) -> str:
        parameters = "".join(f", {k}={v}" for k, v in self.format.parameters().items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format.name}{parameters}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to()`, `.half()`, ...: the dtype of `.weight` follows as a parameter's would."""
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
