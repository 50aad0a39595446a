"""The proof that a weight in the sliced layout is sound, whoever made its tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .unpack import entry_columns
from .weight import (
    ANCHORS,
    DTYPES,
    FLOATS,
    GROUP,
    INT4,
    LANES,
    MAX_ENTRIES,
    MOST_ROWS,
    MOST_SPLITS,
    NUMBERS,
    UNIT,
    WARPS,
    WIDTHS,
    SlicedWeight,
)


def checked(numbers: Sequence[int], tensors: Sequence[Tensor | None]) -> SlicedWeight:
    """`SlicedWeight.numbers()` and the tensors put together again; a ValueError unless they fit."""
    if len(numbers) != len(NUMBERS):
        raise ValueError(f"{len(numbers)} numbers, expected {len(NUMBERS)}: {', '.join(NUMBERS)}")
    rows, columns, dtype, *rest = numbers
    if not 0 <= dtype < len(DTYPES):
        raise ValueError(f"values of type {dtype}, expected a number below {len(DTYPES)}")
    weight = SlicedWeight((rows, columns), DTYPES[dtype], *rest, *tensors)  # type: ignore[arg-type]
    check(weight)
    return weight


def check(weight: SlicedWeight) -> None:
    """Prove that no kernel reads or writes out of bounds. Waits for the device.

    Raises:
        ValueError: names the tensor and what is wrong with it.
    """
    _check_numbers(weight)
    _check_tensors(weight)
    slices = weight.slices.to("cpu", torch.int64)
    _check_slices(weight, slices)
    _check_order(weight)
    _check_columns(weight, slices)


def _check_numbers(weight: SlicedWeight) -> None:
    rows, columns = weight.shape
    if not (1 <= rows <= MOST_ROWS and columns >= 1 and rows * weight.padded < MAX_ENTRIES):
        raise ValueError(
            f"a weight of {rows} x {columns}, expected at most {MOST_ROWS} rows and fewer than "
            f"{MAX_ENTRIES} entries"
        )
    if weight.width not in WIDTHS or weight.warps not in WARPS:
        raise ValueError(
            f"gaps of {weight.width} bits for {weight.warps} warps, expected one of {WIDTHS} bits "
            f"and {WARPS} warps"
        )
    if weight.segment_units < 1 or not 1 <= weight.splits <= MOST_SPLITS:
        raise ValueError(
            f"segments of {weight.segment_units} units in {weight.splits} splits, expected at "
            f"least 1 and at most {MOST_SPLITS} splits"
        )
    reach = weight.segment_units * weight.warps * weight.splits * UNIT * GROUP
    if reach >= MAX_ENTRIES:
        raise ValueError(f"segments reach to entry {reach}, expected less than {MAX_ENTRIES}")
    if weight.window < LANES or weight.window % LANES:
        raise ValueError(f"window is {weight.window}, expected a multiple of {LANES}")
    if weight.scales is not None and weight.group_size < 1:
        raise ValueError(f"group_size is {weight.group_size}, expected at least 1")


def _check_tensors(weight: SlicedWeight) -> None:
    """dtypes, shapes, devices."""
    rows, columns = weight.shape
    slots = -(-rows // LANES) * LANES
    lengths = {name: tensor.shape[:1].numel() for name, tensor in weight.tensors().items()}
    group = () if weight.dtype == INT4 else (GROUP,)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "values": (
            torch.int32 if weight.dtype == INT4 else weight.dtype,
            (lengths["values"], LANES, *group),
        ),
        "gaps": (torch.int32, (lengths["gaps"], weight.width, LANES)),
        "anchors": (weight.anchors.dtype, (lengths["anchors"], LANES)),
        "slices": (torch.int32, (slots // LANES + 1, 3)),
        "order": (torch.int32, (slots,)),
    }
    if (weight.scales is None) != (weight.dtype in FLOATS):
        raise ValueError(f"scales belong to codes, these values are {weight.dtype}")
    if weight.scales is not None:
        expected["scales"] = (torch.float32, (-(-columns // weight.group_size), slots))
    if weight.anchors.dtype not in ANCHORS:
        raise ValueError(f"anchors are in {weight.anchors.dtype}, expected one of {ANCHORS}")
    for name, (dtype, shape) in expected.items():
        tensor = weight.tensors()[name]
        found = tensor.dtype, tuple(tensor.shape)
        if found != (dtype, shape):
            raise ValueError(f"{name} is {found}, expected {(dtype, shape)}")
        if not tensor.is_contiguous() or tensor.is_neg() or tensor.device != weight.values.device:
            raise ValueError(f"{name} must be contiguous and on {weight.values.device}")


def _check_slices(weight: SlicedWeight, slices: Tensor) -> None:
    per_unit = torch.tensor([1, UNIT, UNIT * weight.segment_units])
    groups = slices[1:, :1] - slices[:-1, :1]
    wanted = -(-groups // per_unit)
    if bool((groups < 0).any() | (slices[0] != 0).any()) or not torch.equal(
        slices[1:] - slices[:-1], wanted
    ):
        raise ValueError("slices: groups, units and segments do not follow from each other")
    most = int(wanted[:, 2].max())
    if not (weight.splits - 1) * weight.warps < max(most, 1) <= weight.splits * weight.warps:
        raise ValueError(
            f"slices: a row has up to {most} segments, which aren't {weight.splits} splits of "
            f"{weight.warps} warps"
        )
    sizes = (len(weight.values), len(weight.gaps), len(weight.anchors))
    if sizes != tuple(slices[-1].tolist()):
        raise ValueError(f"slices end at {slices[-1].tolist()}, the tensors at {sizes}")


def _check_order(weight: SlicedWeight) -> None:
    rows, order = weight.shape[0], weight.order.long()
    windows = order.view(-1, LANES).split(weight.window // LANES)  # type: ignore[no-untyped-call]
    for index, part in enumerate(windows):
        first, last = index * weight.window, min((index + 1) * weight.window, rows)
        expected = torch.arange(first, last, device=order.device)
        found = part.flatten().sort().values
        if not (
            torch.equal(found[: len(expected)], expected)
            and bool((found[len(expected) :] == rows).all())
        ):
            raise ValueError(f"order: rows {first} to {last} do not occur once each")


def _check_columns(weight: SlicedWeight, slices: Tensor) -> None:
    starts = torch.zeros(len(weight.values) + 1, dtype=torch.bool)
    starts[slices[:, 0]] = True
    starts = starts.to(weight.values.device)
    for groups, found in entry_columns(weight):
        if bool(((found < 0) | (found >= weight.padded)).any()):
            raise ValueError(f"gaps or anchors lead beyond column {weight.padded}")
        rises = (found[1:, :, 0] > found[:-1, :, -1]).all(dim=1)
        if not bool((rises | starts[groups][1:]).all()):
            raise ValueError("gaps or anchors lead back to columns that were listed before")
