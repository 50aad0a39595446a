"""In which order a module keeps the axes of its weight, and of its inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Axes:
    """What differs between the modules that multiply by a matrix.

    Attributes:
        transposed: the weight is (in, out), as that of transformers' `Conv1D`.
        spatial: axes of size 1 behind (out, in), a pointwise convolution's; the activations have
            as many axes behind their channels.
    """

    transposed: bool = False
    spatial: int = 0

    @classmethod
    def of(cls, module: nn.Module) -> Axes:
        """That of a prunable module, dense or sparse."""
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            return cls(spatial=len(module.kernel_size))
        return getattr(module, "axes", None) or cls(not isinstance(module, nn.Linear))

    def matrix(self, weight: Tensor) -> Tensor:
        """The (out, in) view of a weight as the module keeps it."""
        return weight.T if self.transposed else weight.flatten(1)

    def own(self, matrix: Tensor) -> Tensor:
        """The view of an (out, in) matrix as the module keeps it."""
        if self.transposed:
            return matrix.T
        return matrix[(..., *[None] * self.spatial)] if self.spatial else matrix

    def own_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """The shape of the module's weight for an (out, in) matrix's."""
        return shape[::-1] if self.transposed else (*shape, *[1] * self.spatial)

    def channels_last(self, x: Tensor) -> Tensor:
        """A view of activations, inputs or outputs, with their channels in the last axis."""
        return x.movedim(-1 - self.spatial, -1)

    def channels_back(self, x: Tensor) -> Tensor:
        """The reverse of `channels_last`."""
        return x.movedim(-1, -1 - self.spatial)
