"""Small inputs of a layer that count as 0: y = W h(x), with h(x) = x where |x| > t, else 0.

TEAL (Liu et al. 2024, "Training-Free Activation Sparsity in Large Language Models", eq. 4), after
SLIDE (Chen et al. 2020): what is multiplied by 0 needs not be read. t is one number a layer, a
quantile of |x| over calibration tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .errors import FormatError

# What they are called in a file's metadata.
KEY_THRESHOLD = "input_threshold"
KEY_SHARE = "input_sparsity"


@dataclass(frozen=True)
class InputThreshold:
    """Up to where a layer's inputs count as 0.

    Attributes:
        value: t, at least 0, in the inputs' unit.
        share: of the inputs of calibration tokens that it was to be above, 0 < share < 1.
    """

    value: float
    share: float

    @classmethod
    def of(cls, inputs: Float[Tensor, "tokens in"], share: float) -> InputThreshold:
        """The one that `share` of the inputs, rounded down to a whole number, don't exceed."""
        sizes = inputs.float().abs().flatten()
        count = math.floor(share * sizes.numel())
        return cls(float(sizes.kthvalue(count).values) if count else 0.0, share)

    @classmethod
    def read(cls, value: object, share: object) -> InputThreshold:
        """From a file's metadata.

        Raises:
            FormatError: they aren't what they are to be.
        """
        return cls(_number(KEY_THRESHOLD, value, math.inf), _number(KEY_SHARE, share, 1))

    def description(self) -> dict[str, float]:
        """Its part of a layer's JSON object in the metadata."""
        return {KEY_THRESHOLD: self.value, KEY_SHARE: self.share}

    def apply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """h(x); its derivative is 1 where x stays and 0 elsewhere. t is rounded to x's dtype."""
        return F.hardshrink(x, min(self.value, torch.finfo(x.dtype).max))


def _number(name: str, value: object, limit: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < limit:
        raise FormatError(
            f"{name} {value!r} is not from 0 to below {limit} in its hf_sparse metadata"
        )
    return float(value)
