"""What a kernel is: a form of one weight that is ready to be multiplied, and why it was chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..formats import Format
from ..formats.base import Packed
from .token_classes import Way

Form = Literal["any", "packed", "dense"]


@dataclass(frozen=True)
class Stored:
    """A layer's weight as it is stored.

    Attributes:
        format: storage format.
        tensors: the format's tensors, by local key; checked.
        shape: (out, in).
        dtype: dtype of the dense weight; that of the values may be narrower.
        form: what is wanted of a kernel of ours: a packed weight even if that is slower, on a CPU
            a dense one, or what it finds best.
        activations: "int8" if a kernel may round its inputs to that; None: to nothing.
        zero_inputs: share of a token's inputs that are 0, as far as that is known.
    """

    format: Format
    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]
    dtype: torch.dtype
    form: Form = "any"
    activations: str | None = None
    zero_inputs: float = 0.0

    @property
    def device(self) -> torch.device:
        return self.tensors["weight"].device

    @property
    def values_dtype(self) -> torch.dtype:
        """Of floating-point values, or uint8 for codes."""
        return self.tensors["weight"].dtype

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The dense weight in `dtype`."""
        return self.format.unpack(self.tensors, self.shape, dtype)


class Kernel(ABC):
    """One layer's weight in the form that a kernel multiplies. Holds all there is of the weight."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def consider(cls, stored: Stored) -> Considered:
        """Take the weight over, or say why not. The stored tensors are left as they are."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is resident, by name; must not be written to."""

    @abstractmethod
    def linear(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """`F.linear(x, W, bias)` in x's dtype; differentiable in x and bias."""

    @abstractmethod
    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The dense weight in `dtype`."""

    @abstractmethod
    def packed(self, fmt: Format, dtype: torch.dtype) -> Packed:
        """Back to a storage format, values in `dtype`."""


@dataclass(frozen=True)
class Verdict:
    """What came of considering one kernel for a layer."""

    kernel: str
    accepted: bool
    reason: str
    speedup: float | None = None
    """Over the dense product at one token, measured on this machine; None if not measured."""
    ways: tuple[Way, ...] = ()
    """How products of each class of tokens are made, where the kernel has a choice."""
    seconds: float | None = None
    """Of a product of one token, estimated from what was measured on this machine."""


@dataclass(frozen=True)
class Considered:
    """A verdict, and the kernel if it was accepted."""

    verdict: Verdict
    kernel: Kernel | None = None


@dataclass(frozen=True)
class Choice:
    """The kernel that a layer uses (None: the reference path) and how it came to that."""

    kernel: Kernel | None
    trace: tuple[Verdict, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict on the kernel that was chosen."""
        return self.trace[-1]
