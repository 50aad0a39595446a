"""Products of tokens, rounded to int8, and an integer weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ...operator import check_input
from .. import library
from ..rows import multiply
from .weight import IntegerWeight


def integer_linear(
    x: Tensor, weight: IntegerWeight, bias: Tensor | None = None, path: str | None = None
) -> Tensor:
    """F.linear with x rounded to int8: x[..., K] W^T + bias[N], in x's dtype.

    Each token's x is rounded in blocks of 128 columns, or of a group where groups are smaller, to
    multiples of max |x| / 127. Sums of integers are exact; scaled, they are added in fp32. So the
    error is at most half a multiple times sum |W| over a block's columns, added up over the blocks,
    and fp32's. A block with an infinity or a NaN makes all outputs of its token NaN.

    x may be fp32, bf16 or fp16; rows of x may lie apart. `path` names the instruction set, by
    default the best one. The result doesn't depend on the number of threads.
    """
    return multiply(library.library().integer_linear, x, weight, bias, path)


@dataclass(frozen=True, eq=False)
class IntegerProduct:
    """A weight and its product."""

    weight: IntegerWeight

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear(x, W, bias)` for x [..., in] in a floating-point dtype, which is the result's.

        fp64 isn't rounded: it is multiplied with the dense weight, for gradcheck.
        """
        check_input(x, self.weight.shape[1])
        if x.dtype not in library.FLOATS:
            own_bias = None if bias is None else bias.to(x.dtype)
            return F.linear(x, self.weight.dense(x.dtype), own_bias)
        return integer_linear(x, self.weight, bias)
