"""Counts and selections over whole weights, in the native library where they lie on a CPU.

torch counts, selects and packs booleans there at 5 to 20 ns a weight, the library at 0.1 to 3, and
numpy, which stands in where there is none, at 0.1 to 10. All give the same.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor

from .bits import count_ones, nonzero_bits, unpack_bits
from .native import FLOATS, call, library_for, on_cpu
from .shapes import Mask


def count_true(mask: Bool[Tensor, "..."]) -> int:
    """How many are True."""
    if on_cpu(mask):
        return int(np.count_nonzero(mask.numpy()))
    return int(torch.count_nonzero(mask))


def count_true_per_row(mask: Bool[Tensor, "rows n"]) -> Int64[Tensor, " rows"]:
    """How many of each row are True."""
    if on_cpu(mask):
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
    return mask.sum(dim=1)


def count_zeros(weight: Shaped[Tensor, "..."]) -> int:
    """How many are 0; -0 is."""
    if not on_cpu(weight):
        return weight.numel() - int(torch.count_nonzero(weight))
    rows = weight if weight.dim() == 2 else weight.reshape(1, -1)
    return weight.numel() - count_ones(nonzero_bits(rows))


def all_finite(values: Shaped[Tensor, "..."]) -> bool:
    """Is there neither NaN nor an infinite value?"""
    if values.numel() == 0:
        return True
    library = library_for(values)
    if library is not None and values.dtype in FLOATS and values.is_contiguous():
        number = FLOATS[values.dtype]
        return bool(library.whole_all_finite(values.numel(), values.data_ptr(), number))
    extremes = torch.stack(values.detach().aminmax())  # NaN if there is one
    return bool(torch.isfinite(extremes).all())


def at_most(values: Float[Tensor, "rows n"], limit: Float[Tensor, "rows 1"]) -> Mask:
    """values <= limit; False for NaN."""
    if on_cpu(values) and values.dtype == limit.dtype == torch.float32:
        return torch.from_numpy(np.less_equal(values.numpy(), limit.numpy()))
    return values <= limit


def keep_highest(scores: Float[Tensor, "rows n"], drop: int) -> Mask | None:
    """False for the `drop` lowest scores of each row, of equal ones for the earlier, 0 < drop <= n;
    None where the library can't say."""
    library = library_for(scores)
    if library is None or scores.dtype != torch.float32:
        return None
    scores = scores.detach().contiguous()
    mask = torch.empty(scores.shape, dtype=torch.bool, device="cpu")
    call(library.whole_keep_highest, *scores.shape, scores, drop, mask)
    return mask


def kept_values(
    weight: Shaped[Tensor, "rows n"], bits: UInt8[Tensor, "rows bytes"]
) -> Shaped[Tensor, " kept"]:
    """Those whose bit is set, in row-major order."""
    library = library_for(weight, bits)
    if library is not None and weight.numel():
        weight, bits = weight.detach().contiguous(), bits.contiguous()
        kept = torch.empty(count_ones(bits), dtype=weight.dtype, device="cpu")
        size = weight.element_size()
        call(library.whole_kept_items, *weight.shape, weight, size, bits, len(kept), kept)
        return kept
    return weight[unpack_bits(bits, weight.shape[1])]


def zero_outside(
    weight: Shaped[Tensor, "out in"], mask: Bool[Tensor, "out in"], out: Tensor | None = None
) -> Shaped[Tensor, "out in"]:
    """The weight, but +0 where the mask is False, in new memory or `out`, if that is contiguous."""
    library = library_for(weight, mask)
    if library is None or not weight.numel():
        return weight.where(mask, 0)
    weight, mask = weight.detach().contiguous(), mask.contiguous()
    result = out if out is not None and out.is_contiguous() else torch.empty_like(weight)
    count, size = weight.numel(), weight.element_size()
    call(library.whole_zero_outside, count, weight, size, mask, result)
    return result
