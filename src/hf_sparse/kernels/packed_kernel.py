"""A kernel whose product is an operator of torch; see `operator`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

from jaxtyping import Float
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from ..core.recording import transformed
from .base import Considered, Kernel, Stored, Verdict
from .operator import AliveWeights, apply, unwatched

P = TypeVar("P", bound=Callable[..., Tensor])


class PackedKernel(Kernel, Generic[P]):
    """A kernel that multiplies through an operator made here.

    Attributes:
        product: makes x W' of x.
        operators, alive: what `define_product` made; of x and `operands()`.
    """

    operators: ClassVar[tuple[CustomOpDef, CustomOpDef]]
    alive: ClassVar[AliveWeights[Any]]

    def __init__(self, product: P, zeros: Tensor | None = None) -> None:
        """Zero points the file needs and the product doesn't: codes are q - z."""
        self.product = product
        self._zeros = zeros
        self.alive.add(product, self.operands())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["product"], state["_zeros"])  # type: ignore[misc]

    @classmethod
    def consider(cls, stored: Stored) -> Considered:
        reason = cls.obstacle(stored)
        return cls.take(stored) if reason is None else cls.refuse(reason)

    @staticmethod
    @abstractmethod
    def obstacle(stored: Stored) -> str | None:
        """Why a stored weight can't be multiplied in this form here; None if it may be."""

    @classmethod
    @abstractmethod
    def take(cls, stored: Stored) -> Considered:
        """`consider` where there is no obstacle."""

    @classmethod
    def refuse(cls, reason: str, speedup: float | None = None) -> Considered:
        """What a weight comes to that isn't taken."""
        return Considered(Verdict(cls.name, False, reason, speedup))

    @abstractmethod
    def operands(self) -> tuple[Any, ...]:
        """The weight as the operator takes it, behind x."""

    def linear(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*batch out"]:
        if unwatched(x, bias):
            y: Tensor = self._straight(x, bias)
            return y
        if transformed():
            y = apply(x, self.operators, *self.operands())
        else:
            y = self.operators[0](x, *self.operands())
        return y if bias is None else y + bias.to(y.dtype)

    def _straight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`linear` without the operator."""
        y: Tensor = self.product(x)
        return y if bias is None else y + bias.to(y.dtype)
