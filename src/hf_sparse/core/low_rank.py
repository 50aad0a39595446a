"""The low-rank part of a weight, held beside its sparse part: W ~ S + B A."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .counting import all_finite
from .errors import FormatError

# Names of the buffers, and what follows a layer's name in files.
KEY_A = "weight_low_rank_a"
KEY_B = "weight_low_rank_b"


@dataclass(frozen=True)
class LowRank:
    """B A, as its two factors.

    Attributes:
        b: B, shape (out, rank).
        a: A, shape (rank, in).
    """

    b: Float[Tensor, "out rank"]
    a: Float[Tensor, "rank in"]

    @property
    def rank(self) -> int:
        return len(self.a)

    def product(self) -> Float[Tensor, "out in"]:
        """B A, dense."""
        return self.b @ self.a

    def added_to(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """S + B A in the dtype of S, computed in fp32 or wider and rounded once."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) + self.to(wide).product()).to(weight.dtype)

    def to(self, dtype: torch.dtype) -> LowRank:
        """With factors of another dtype."""
        return LowRank(self.b.to(dtype), self.a.to(dtype))

    def tensors(self) -> dict[str, Tensor]:
        """The factors by the names that they are stored under."""
        return {KEY_A: self.a, KEY_B: self.b}

    def check(self, shape: tuple[int, int]) -> None:
        """Raise a FormatError that names the tensor unless the factors suit an (out, in) weight."""
        found = {key: (tuple(t.shape), t.dtype) for key, t in self.tensors().items()}
        check_low_rank_layout(found, shape, self.rank)
        for key, tensor in self.tensors().items():
            if not all_finite(tensor):
                raise FormatError(f"{key} holds NaN or infinite values")


def check_low_rank_layout(
    found: Mapping[str, tuple[tuple[int, ...], torch.dtype]], shape: tuple[int, int], rank: int
) -> None:
    """Names, shapes and dtypes of the factors: what a file's header can tell."""
    if not 0 < rank <= min(shape):
        raise FormatError(f"low_rank is {rank}, a weight of shape {shape} takes 1 to {min(shape)}")
    expected = {KEY_A: (rank, shape[1]), KEY_B: (shape[0], rank)}
    for key, size in expected.items():
        if key not in found:
            raise FormatError(f"{key} is missing: low_rank is {rank}")
        if found[key][0] != size:
            raise FormatError(f"{key} has shape {found[key][0]}, expected {size}")
        if not found[key][1].is_floating_point:
            raise FormatError(f"{key} has dtype {found[key][1]}, expected a floating-point type")
