"""What weights in the native library's layouts share."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from . import library

VALUE_PADDING = 64  # bytes that the decoders may read beyond the last value


class NativeWeight(ABC):
    """A packed weight, checked when it is made: from then on the kernels trust its masks.

    The tensors must not be written to afterwards.

    Attributes:
        layout: what the names of the library's functions for it begin with.
        ways: of making products, by class of tokens, the first of which is the usual one.
        shape: (out, in).
        dtype: of the kept values.
        scales: of codes, in the layout's order; `group_size` columns share one.
        address: of the library's struct.
    """

    layout: ClassVar[str]
    ways: ClassVar[tuple[tuple[str, ...], ...]]
    shape: tuple[int, int]
    dtype: torch.dtype
    scales: Tensor | None
    group_size: int
    address: int

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is resident, by name."""

    @property
    @abstractmethod
    def share(self) -> float:
        """How much of the weight is kept, 0 to 1."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The dense weight in any floating-point dtype; new memory."""

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "in rows"]]]:
        """Some outputs after others, and their weights; each is gone when the next one comes."""
        yield slice(0, self.shape[0]), self.dense(dtype).T

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _take(self, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None) -> None:
        """Check a tensor, of any length if no shape is given."""
        tensor = library.checked(getattr(self, name), name, (dtype,))
        library.check_shape(tensor, name, (tensor.numel(),) if shape is None else shape)
        object.__setattr__(self, name, tensor)

    def _hold(self, struct: ctypes.Structure) -> None:
        """Keep the library's struct, and have the library check it."""
        object.__setattr__(self, "_struct", struct)
        object.__setattr__(self, "address", ctypes.addressof(struct))
        code = getattr(library.library(), f"{self.layout}_check")(self.address)
        library.raise_on(code, f"{self.layout} weight of {self.shape[0]} x {self.shape[1]}")
