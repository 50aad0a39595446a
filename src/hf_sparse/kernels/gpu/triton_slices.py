"""What the Triton kernels of the sliced layout share: a slice's place, and their arguments.

Triton's interpreter runs them on a CPU (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .weight import GROUP, INT4, LANES, UNIT, SlicedWeight


@triton.jit
def slice_of(slices, slice_):
    """First group, unit and segment of a slice, and its number of groups."""
    first_group = tl.load(slices + 3 * slice_)
    first_unit = tl.load(slices + 3 * slice_ + 1)
    first_segment = tl.load(slices + 3 * slice_ + 2)
    groups = tl.load(slices + 3 * slice_ + 3) - first_group
    return first_group, first_unit, first_segment, groups


@triton.jit
def first_column(anchor, unit, groups, padded, WIDTH: tl.constexpr):
    """Where a segment that begins with a unit begins, but for its first gap."""
    # In 64 bits: with 131072 columns the product needs more than 31.
    even = (unit * 4 + groups * 0).to(tl.int64) * padded // tl.maximum(groups, 1)
    return (anchor.to(tl.int32) + (even >> WIDTH).to(tl.int32)) << WIDTH


def tensors(weight: SlicedWeight) -> tuple[Any, ...]:
    scales = weight.order if weight.scales is None else weight.scales  # any pointer: it isn't read
    return weight.values, weight.gaps, weight.anchors, weight.slices, weight.order, scales


def constants(weight: SlicedWeight) -> dict[str, Any]:
    grouped = weight.scales is not None and len(weight.scales) > 1
    return {
        "WIDTH": weight.width,
        "SEGMENT_UNITS": weight.segment_units,
        "NIBBLES": weight.dtype == INT4,
        "SCALED": weight.scales is not None,
        "GROUP_SIZE": weight.group_size if grouped else 0,
    }


assert (GROUP, UNIT, LANES) == (8, 4, 32), "the kernels are written for these"
