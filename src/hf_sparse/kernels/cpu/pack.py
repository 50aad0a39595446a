"""Stored or dense weights into the tile layout, and back.

weight = pack(bitmask, values, (out_features, in_features))
bitmask, values = unpack(weight)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import library
from .native_weight import VALUE_PADDING
from .weight import BLOCK_COLUMNS, ROWS, TileWeight

PACKABLE = (*library.FLOATS, torch.int8)  # int4 is `narrow`'s


def tile_scales(scales: Tensor, n: int) -> Tensor:
    """Scales [N] or [N, groups] in the order of the kernels, fp32[tiles, groups, 16]."""
    scales = library.checked(scales, "scales", library.FLOATS)
    if scales.dim() not in (1, 2) or scales.shape[0] != n:
        raise ValueError(f"scales have shape {tuple(scales.shape)}, expected ({n},) or ({n}, G)")
    columns = scales.float().reshape(n, -1)
    tiles = -(-n // ROWS)
    padded = columns.new_zeros(tiles * ROWS, columns.shape[1])
    padded[:n] = columns
    return padded.reshape(tiles, ROWS, -1).transpose(1, 2).contiguous()


def _pack(
    n: int,
    k: int,
    dtype: torch.dtype,
    count: int,
    scales: Tensor | None,
    group_size: int | None,
    call: Callable[..., int],
) -> TileWeight:
    tiles, pairs = -(-n // ROWS), -(-k // 2)
    masks = torch.empty(tiles, pairs, dtype=torch.int32, device="cpu")
    tile_base = torch.empty(tiles + 1, dtype=torch.int64, device="cpu")
    block_off = torch.empty(tiles, -(-k // BLOCK_COLUMNS), dtype=torch.int32, device="cpu")
    packed = torch.empty(count * dtype.itemsize + VALUE_PADDING, dtype=torch.uint8, device="cpu")
    code = call(
        masks.data_ptr(),
        tile_base.data_ptr(),
        block_off.data_ptr(),
        packed.data_ptr(),
        packed.numel(),
        library.thread_pool(),
    )
    library.raise_on(code, f"packing a weight of {n} x {k}")
    tiled = tile_scales(scales, n) if scales is not None else None
    groups = tiled.shape[1] if tiled is not None else 1
    if group_size is None:
        if groups != 1:
            raise ValueError(f"scales of {groups} groups need a group_size")
        group_size = k
    return TileWeight((n, k), dtype, masks, tile_base, block_off, packed, tiled, group_size)


def pack(
    bitmask: Tensor,
    values: Tensor,
    shape: tuple[int, int],
    scales: Tensor | None = None,
    group_size: int | None = None,
) -> TileWeight:
    """Packs the file's layout: uint8[N, ceil(K/8)], lowest bit first, and row-major kept values.

    int8 values need `scales`, [N] or [N, ceil(K / group_size)]. Raises `NativeError` if the mask's
    bits and the values' number differ or a bit beyond K is set.
    """
    n, k = shape
    library.check_dims(n, k)
    bitmask = library.checked(bitmask, "bitmask", (torch.uint8,))
    library.check_shape(bitmask, "bitmask", (n, -(-k // 8)))
    values = library.checked(values, "values", PACKABLE)
    library.check_shape(values, "values", (values.numel(),))
    count = values.numel()
    return _pack(
        n,
        k,
        values.dtype,
        count,
        scales,
        group_size,
        lambda *to: library.library().tile_pack_bitmask(
            n, k, bitmask.data_ptr(), values.data_ptr(), count, library.NUMBERS[values.dtype], *to
        ),
    )


def pack_dense(
    dense: Tensor, scales: Tensor | None = None, group_size: int | None = None
) -> TileWeight:
    """Packs what isn't zero of dense[N, K]."""
    dense = library.checked(dense.detach(), "dense", PACKABLE)
    if dense.dim() != 2:
        raise ValueError(f"dense has {dense.dim()} dimensions, expected 2")
    n, k = dense.shape
    library.check_dims(n, k)
    rows = dense if dense.stride(1) == 1 and dense.stride(0) >= k else dense.contiguous()
    dtype, stride = library.NUMBERS[rows.dtype], max(rows.stride(0), k)
    count = library.library().tile_count_dense(n, k, rows.data_ptr(), stride, dtype)
    if count < 0:
        raise library.NativeError(f"dense of {n} x {k}, rows {stride} apart, can't be read")
    return _pack(
        n,
        k,
        rows.dtype,
        count,
        scales,
        group_size,
        lambda *to: library.library().tile_pack_dense(n, k, rows.data_ptr(), stride, dtype, *to),
    )


def narrow(weight: TileWeight) -> TileWeight:
    """An int8 weight with values in -8..7 as int4: value i is nibble i % 2 of byte i // 2.

    Raises:
        ValueError: a value is out of range, or the weight isn't int8.
    """
    if weight.dtype != torch.int8:
        raise ValueError(f"only int8 values can be narrowed, not {weight.dtype}")
    values = weight.values[: weight.count].view(torch.int8)
    if weight.count and not bool(((values >= -8) & (values <= 7)).all()):
        raise ValueError("int4 values are -8 to 7, these aren't")
    size = -(-weight.count // 2)
    nibbles = torch.zeros(2 * size, dtype=torch.uint8, device="cpu")
    nibbles[: weight.count] = weight.values[: weight.count] & 15
    packed = torch.zeros(size + VALUE_PADDING, dtype=torch.uint8, device="cpu")
    packed[:size] = nibbles[::2] | nibbles[1::2] << 4
    return replace(weight, dtype=library.INT4, values=packed)


def _widen(weight: TileWeight) -> TileWeight:
    """`narrow` undone."""
    bytes_ = weight.values[: -(-weight.count // 2)].view(torch.int8)
    nibbles = torch.stack([bytes_ << 4 >> 4, bytes_ >> 4], dim=1).flatten()
    values = torch.zeros(weight.count + VALUE_PADDING, dtype=torch.int8, device="cpu")
    values[: weight.count] = nibbles[: weight.count]
    return replace(weight, dtype=torch.int8, values=values.view(torch.uint8))


def unpack(weight: TileWeight) -> tuple[Tensor, Tensor]:
    """The bitmask and the values that `pack` was given; of an int4 weight those in int8."""
    if weight.dtype == library.INT4:
        weight = _widen(weight)
    n, k = weight.shape
    bitmask = torch.empty(n, -(-k // 8), dtype=torch.uint8, device="cpu")
    values = torch.empty(weight.count, dtype=weight.dtype, device="cpu")
    code = library.library().tile_unpack(
        weight.address, bitmask.data_ptr(), values.data_ptr(), library.thread_pool()
    )
    library.raise_on(code, "unpacking")
    return bitmask, values
