"""What a storage format is: stateless packing of one (out, in) weight into local tensors.

The tensor under the key "weight" holds the values; companions are called "weight_...". All
functions leave their inputs alone and work on meta tensors where values don't matter.

A `Layout` says where the kept values are and keeps them as they are, floating-point numbers or
codes. A `Format` is what a file holds: a layout, or codes of a grid in a layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..core.errors import FormatError
from ..core.grids import Grid, QuantizedWeight
from ..core.patterns import Pattern

Packed = dict[str, Tensor]
# What a format is given to hold: a dense weight, or its codes on a grid.
Held: TypeAlias = Tensor | QuantizedWeight


@dataclass(frozen=True)
class Accepted:
    """The layout can hold the weight; `bytes` is what the packed tensors take."""

    format: Layout
    bytes: int


@dataclass(frozen=True)
class Rejected:
    """The layout can't hold the weight, and why."""

    reason: str


@dataclass(frozen=True)
class TensorSpec:
    """What a packed tensor must look like; `None` in a shape or as dtype means free.

    dtype None stands for "a floating-point type": the values'.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype | None

    def check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raise a FormatError that names the tensor unless shape and dtype agree."""
        same_rank = len(shape) == len(self.shape)
        if not same_rank or any(
            want not in (None, got) for want, got in zip(self.shape, shape, strict=True)
        ):
            raise FormatError(f"{name} has shape {shape}, expected {self.describe()}")
        if dtype != self.dtype if self.dtype is not None else not dtype.is_floating_point:
            expected = self.dtype or "a floating-point type"
            raise FormatError(f"{name} has dtype {dtype}, expected {expected}")

    def describe(self) -> str:
        return "(" + ", ".join("*" if size is None else str(size) for size in self.shape) + ")"


class Format(ABC):
    """How a file holds one weight. Instances are frozen values and carry parameters only.

    Attributes:
        grid: of the codes that it holds; None if it holds floating-point values.
        layout: where the kept values or codes are.
    """

    name: ClassVar[str]
    grid: Grid | None
    layout: Layout

    @property
    def label(self) -> str:
        """What reports and tables call it."""
        return self.name

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """The format's parameters as JSON values; {} if it has none."""

    @abstractmethod
    def specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """The packed tensors of an (out, in) weight, by local key."""

    @abstractmethod
    def check(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        """Prove that the tensors' contents agree, so that `unpack` can't read out of bounds.

        Shapes and dtypes have been checked against `specs` before.

        Raises:
            FormatError: names the tensor and what is wrong with it.
        """

    @abstractmethod
    def pack(self, held: Any) -> Packed:
        """A dense weight, or its codes if there is a grid, to packed tensors."""

    @abstractmethod
    def unpack(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Float[Tensor, "out in"]:
        """Packed tensors to the dense weight in `dtype`."""


class Layout(Format):
    """Where the kept values are. The values may be of any dtype; what is 0 is not kept."""

    grid = None

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        return self

    @classmethod
    @abstractmethod
    def fits(
        cls, weight: Shaped[Tensor, "out in"], pattern: Pattern, value_bits: int | None = None
    ) -> Accepted | Rejected:
        """Can this layout hold the weight, with which parameters and how many bytes?

        `value_bits` is what a kept value takes; None for the weight's own dtype.
        """

    @classmethod
    @abstractmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Layout:
        """Rebuild from `parameters()`; raises FormatError on anything unexpected."""

    @abstractmethod
    def count(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> int:
        """How many values the companions call for."""

    @abstractmethod
    def pack(self, weight: Shaped[Tensor, "out in"]) -> Packed:
        """Dense weight to packed tensors; lossless but for the sign of zeros."""

    @abstractmethod
    def sample(
        self, tensors: Mapping[str, Tensor], dense: Shaped[Tensor, "rows in"], first: int
    ) -> Shaped[Tensor, "..."]:
        """What a dense matrix has where the weight is kept, in the order of the values.

        `dense` stands for the rows of the weight from `first` on. The samples of consecutive rows,
        concatenated along their first dimension, have the shape of the values.
        """

    @abstractmethod
    def unpack(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Shaped[Tensor, "out in"]:
        """Packed tensors to the dense weight in `dtype`. Values beyond the last are left over."""


def stored_bytes(values: int, weight: Tensor, value_bits: int | None) -> int:
    """Bytes of so many values, of `value_bits` each or in the weight's dtype."""
    return -(-values * (value_bits or 8 * weight.element_size()) // 8)


def check_packed(fmt: Format, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
    """Everything that must hold before packed tensors are used: names, shapes, dtypes, contents."""
    check_layout(fmt, {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()}, shape)
    fmt.check(tensors, shape)


def check_layout(
    fmt: Format, found: Mapping[str, tuple[tuple[int, ...], torch.dtype]], shape: tuple[int, int]
) -> None:
    """Names, shapes and dtypes alone: what a file's header can tell without reading the data."""
    specs = fmt.specs(shape)
    if missing := [key for key in specs if key not in found]:
        raise FormatError(f"{missing[0]} is missing: format {fmt.name!r} needs {', '.join(specs)}")
    if extra := [key for key in found if key not in specs]:
        raise FormatError(f"{extra[0]} doesn't belong to format {fmt.name!r} ({', '.join(specs)})")
    for key, spec in specs.items():
        spec.check(key, *found[key])


def packed_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that the tensors' data take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
