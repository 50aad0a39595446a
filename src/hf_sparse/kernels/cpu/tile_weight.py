"""Weights packed in the tile layout of the native kernels, and their product with x.

`csrc/tiles.h` describes the layout and why it is so.

    weight = pack(bitmask, values, (out_features, in_features))
    y = linear(x, weight, bias)
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import library

ROWS = 16  # outputs of a tile
BLOCK_COLUMNS = 256  # columns between two entries of block_off
VALUE_PADDING = 64  # bytes that the decoders may read beyond the last value

PACKABLE = (*library.FLOATS, torch.int8)  # int4 is `narrow`'s


@dataclass(frozen=True, eq=False)
class TileWeight:
    """A packed weight, checked when it is made: from then on the kernels trust its masks.

    masks: int32[tiles, pairs], bit 2 r + c for row r and column c of a pair
    tile_base: int64[tiles + 1]; block_off: int32[tiles, ceil(K / 256)]
    values: uint8[count * item size + 64], the kept values of `dtype`; of int4, two to a byte
    scales: fp32[tiles, groups, 16] for int8 and int4, else None; `group_size` columns share one

    The tensors must not be written to afterwards. `address` is that of the library's
    `tiles::Weight`.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    masks: Tensor
    tile_base: Tensor
    block_off: Tensor
    values: Tensor
    scales: Tensor | None = None
    group_size: int = 0
    _struct: library.Weight = field(init=False, repr=False)
    address: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        n, k = self.shape
        library.check_dims(n, k)
        tiles, pairs = -(-n // ROWS), -(-k // 2)
        if self.dtype not in library.NUMBERS:
            raise TypeError(f"values are {self.dtype}, expected one of {list(library.NUMBERS)}")
        for name, dtype, shape in (
            ("masks", torch.int32, (tiles, pairs)),
            ("tile_base", torch.int64, (tiles + 1,)),
            ("block_off", torch.int32, (tiles, -(-k // BLOCK_COLUMNS))),
            ("values", torch.uint8, (self.values.numel(),)),
        ):
            tensor = getattr(self, name)
            library.check_tensor(tensor, name, (dtype,))
            library.check_shape(tensor, name, shape)
        if (self.scales is None) != (self.dtype not in library.INTEGERS):
            raise ValueError(f"{self.dtype} values and scales {self.scales is not None}")
        if self.scales is not None:
            if self.group_size < 1 or (self.group_size < k and self.group_size % 2):
                raise ValueError(
                    f"group_size {self.group_size} must be positive, and even below K = {k}"
                )
            library.check_tensor(self.scales, "scales", (torch.float32,))
            library.check_shape(self.scales, "scales", (tiles, -(-k // self.group_size), ROWS))
        struct = library.Weight(
            n,
            k,
            self.masks.data_ptr(),
            self.tile_base.data_ptr(),
            self.block_off.data_ptr(),
            self.values.data_ptr(),
            self.scales.data_ptr() if self.scales is not None else None,
            self.values.numel(),
            self.group_size,
            library.NUMBERS[self.dtype],
        )
        object.__setattr__(self, "_struct", struct)
        object.__setattr__(self, "address", ctypes.addressof(struct))
        library.raise_on(library.library().tile_check(self.address), f"tile weight of {n} x {k}")

    @property
    def count(self) -> int:
        """Kept values."""
        return int(self.tile_base[-1])

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        tensors = (self.masks, self.tile_base, self.block_off, self.values, self.scales)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        # The struct holds addresses: a copy is made, and checked, anew.
        return TileWeight, (
            self.shape,
            self.dtype,
            self.masks,
            self.tile_base,
            self.block_off,
            self.values,
            self.scales,
            self.group_size,
        )


def tile_scales(scales: Tensor, n: int) -> Tensor:
    """Scales [N] or [N, groups] in the order of the kernels, fp32[tiles, groups, 16]."""
    library.check_tensor(scales, "scales", library.FLOATS)
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
    masks = torch.empty(tiles, pairs, dtype=torch.int32)
    tile_base = torch.empty(tiles + 1, dtype=torch.int64)
    block_off = torch.empty(tiles, -(-k // BLOCK_COLUMNS), dtype=torch.int32)
    packed = torch.empty(count * dtype.itemsize + VALUE_PADDING, dtype=torch.uint8)
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
    library.check_tensor(bitmask, "bitmask", (torch.uint8,))
    library.check_shape(bitmask, "bitmask", (n, -(-k // 8)))
    library.check_tensor(values, "values", PACKABLE)
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
    library.check_tensor(dense, "dense", PACKABLE)
    if dense.dim() != 2:
        raise ValueError(f"dense has {dense.dim()} dimensions, expected 2")
    n, k = dense.shape
    library.check_dims(n, k)
    rows = dense.detach()
    if rows.stride(1) != 1 or rows.stride(0) < k:
        rows = rows.contiguous()
    dtype, stride = library.NUMBERS[rows.dtype], max(rows.stride(0), k)
    count = library.library().tile_count_dense(n, k, rows.data_ptr(), stride, dtype)
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
    nibbles = torch.zeros(2 * size, dtype=torch.uint8)
    nibbles[: weight.count] = weight.values[: weight.count] & 15
    packed = torch.zeros(size + VALUE_PADDING, dtype=torch.uint8)
    packed[:size] = nibbles[::2] | nibbles[1::2] << 4
    return replace(weight, dtype=library.INT4, values=packed)


def _widen(weight: TileWeight) -> TileWeight:
    """`narrow` undone."""
    bytes_ = weight.values[: -(-weight.count // 2)].view(torch.int8)
    nibbles = torch.stack([bytes_ << 4 >> 4, bytes_ >> 4], dim=1).flatten()
    values = torch.zeros(weight.count + VALUE_PADDING, dtype=torch.int8)
    values[: weight.count] = nibbles[: weight.count]
    return replace(weight, dtype=torch.int8, values=values.view(torch.uint8))


def unpack(weight: TileWeight) -> tuple[Tensor, Tensor]:
    """The bitmask and the values that `pack` was given; of an int4 weight those in int8."""
    if weight.dtype == library.INT4:
        weight = _widen(weight)
    n, k = weight.shape
    bitmask = torch.empty(n, -(-k // 8), dtype=torch.uint8)
    values = torch.empty(weight.count, dtype=weight.dtype)
    code = library.library().tile_unpack(
        weight.address, bitmask.data_ptr(), values.data_ptr(), library.thread_pool()
    )
    library.raise_on(code, "unpacking")
    return bitmask, values


def linear(
    x: Tensor, weight: TileWeight, bias: Tensor | None = None, path: str | None = None
) -> Tensor:
    """F.linear: x[..., K] W^T + bias[N], summed in fp32, in x's dtype.

    x may be fp32, bf16 or fp16 whatever the values are; rows of x may lie apart. `path` names the
    instruction set, by default the best one. The result doesn't depend on the number of threads.
    """
    n, k = weight.shape
    library.check_tensor(x, "x", library.FLOATS)
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {k})")
    if bias is not None:
        library.check_tensor(bias, "bias", library.FLOATS)
        library.check_shape(bias, "bias", (n,))
    m = math.prod(x.shape[:-1])
    rows = x if x.dim() == 2 else x.reshape(m, k)
    stride = rows.stride(0)
    # A single row has no stride to speak of, and torch reports any number for it.
    if (k > 1 and rows.stride(1) != 1) or (m > 1 and stride < k):
        rows = rows.contiguous()
        stride = k
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
    dtype = library.NUMBERS[x.dtype]
    code = library.library().tile_linear(
        weight.address,
        library.path_number(path),
        rows.data_ptr(),
        dtype,
        m,
        max(stride, k),
        bias.data_ptr() if bias is not None else None,
        library.NUMBERS[bias.dtype] if bias is not None else 0,
        y.data_ptr(),
        dtype,
        n,
        library.thread_pool(),
    )
    library.raise_on(code, f"linear of x {tuple(x.shape)} and a weight of {n} x {k}")
    return y
