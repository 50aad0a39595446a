"""A weight of codes packed in the octet layout of the integer kernels, and how it is packed.

`csrc/integer.h` describes the layout and why it is so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import BFloat16, Float, Int8
from torch import Tensor

from .. import library
from ..native_weight import VALUE_PADDING, NativeWeight

OCTET = 8  # rows of a tile, columns of a unit
BITS = (8, 4)
ANY, ALL = 0, 8  # of `kept`
FIXED_MARGIN = 1.1  # times the bytes that a fixed count may take, as it is decoded faster


@dataclass(frozen=True, eq=False)
class IntegerWeight(NativeWeight):
    """A weight of codes in tiles of 8 rows, for products with activations rounded to int8.

    masks: uint8[tiles, units, 8], a row's mask in 8 columns; empty if all codes are kept
    tile_base: int64[tiles + 1]; values: uint8[bytes + 64]
    scales: bf16[tiles, groups, 8]; `group_size` columns share one
    bits: 8 or 4; kept: codes in each 8 columns of a row, 8 for all, 0 for as many as the mask says
    """

    layout: ClassVar[str] = "integer"
    # Rounded activations are multiplied from the packed weight only.
    ways: ClassVar[tuple[tuple[str, ...], ...]] = (("packed",),) * 4
    shape: tuple[int, int]
    masks: Tensor
    tile_base: Tensor
    values: Tensor
    scales: Tensor
    group_size: int
    bits: int
    kept: int
    dtype: torch.dtype = field(init=False)
    _struct: library.IntegerWeight = field(init=False, repr=False)
    address: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        n, k = self.shape
        library.check_dims(n, k)
        tiles, units = -(-n // OCTET), -(-k // OCTET)
        if self.bits not in BITS or not ANY <= self.kept <= ALL:
            raise ValueError(
                f"bits={self.bits}, kept={self.kept}: expected bits of 8 or 4, kept of 0 to 8"
            )
        if self.group_size < 1 or (self.group_size < k and self.group_size % OCTET):
            raise ValueError(
                f"group_size {self.group_size} must be positive, below K = {k} a multiple of 8"
            )
        object.__setattr__(self, "dtype", library.INT4 if self.bits == 4 else torch.int8)
        groups = -(-k // self.group_size)
        masks = (0,) if self.kept == ALL else (tiles, units, OCTET)
        self._take("masks", torch.uint8, masks)
        self._take("tile_base", torch.int64, (tiles + 1,))
        self._take("values", torch.uint8, None)
        self._take("scales", torch.bfloat16, (tiles, groups, OCTET))
        self._hold(
            library.IntegerWeight(
                n,
                k,
                None if self.kept == ALL else self.masks.data_ptr(),
                self.tile_base.data_ptr(),
                self.values.data_ptr(),
                self.scales.data_ptr(),
                self.values.numel(),
                min(self.group_size, k),  # which means the same and fits 64 bits
                self.bits,
                self.kept,
            )
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is resident, by name."""
        return {name: getattr(self, name) for name in ("masks", "tile_base", "values", "scales")}

    @property
    def share(self) -> float:
        """How much of the weight is kept, 0 to 1, zeros that fill up a count or a byte with it."""
        return int(self.tile_base[-1]) * 8 / self.bits / (self.shape[0] * self.shape[1])

    @property
    def rows_scales(self) -> BFloat16[Tensor, "out groups"]:
        """The scales by row, as `pack` was given them."""
        return self.scales.transpose(1, 2).flatten(0, 1)[: self.shape[0]].contiguous()

    def codes(self) -> Int8[Tensor, "out in"]:
        """The codes that were packed; new memory."""
        codes = torch.empty(self.shape, dtype=torch.int8, device="cpu")
        code = library.library().integer_unpack(
            self.address, codes.data_ptr(), library.thread_pool()
        )
        library.raise_on(code, "unpacking")
        return codes

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Code times scale in fp32, rounded once to `dtype`."""
        columns = self.shape[1]
        width = min(self.group_size, columns)
        scales = self.rows_scales.float().repeat_interleave(width, dim=1)[:, :columns]
        return self.codes().float().mul_(scales).to(dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        # The struct holds addresses: a copy is made, and checked, anew.
        tensors = self.tensors.values()
        return IntegerWeight, (self.shape, *tensors, self.group_size, self.bits, self.kept)


def pack(
    codes: Int8[Tensor, "out in"],
    scales: Float[Tensor, "out groups"],
    group_size: int,
    kept: int | None = None,
) -> IntegerWeight:
    """Pack codes in -128..127, in 4 bits where they fit.

    Args:
        codes: int8; zeros are what is pruned.
        scales: exact in bf16; `group_size` columns share one.
        group_size: a multiple of 8, or at least the number of columns.
        kept: see `IntegerWeight`; None: what takes least, see `storage_class`.

    Raises:
        NativeError: some 8 columns of a row have more codes than `kept`.
    """
    codes = library.checked(codes, "codes", (torch.int8,)).contiguous()
    n, k = codes.shape
    library.check_dims(n, k)
    low, high = (int(code) for code in codes.aminmax())
    bits = 4 if low >= -8 and high <= 7 else 8
    if kept is None:
        kept = storage_class(codes, bits)
    tiles, units = -(-n // OCTET), -(-k // OCTET)
    lib, pool = library.library(), library.thread_pool()
    tile_base = torch.empty(tiles + 1, dtype=torch.int64, device="cpu")
    code = lib.integer_measure(n, k, codes.data_ptr(), bits, kept, tile_base.data_ptr(), pool)
    library.raise_on(code, f"measuring codes of {n} x {k}")
    size = int(tile_base[-1]) + VALUE_PADDING
    values = torch.empty(size, dtype=torch.uint8, device="cpu")
    masks = torch.empty(
        (0,) if kept == ALL else (tiles, units, OCTET), dtype=torch.uint8, device="cpu"
    )
    code = lib.integer_pack(
        n, k, codes.data_ptr(), bits, kept, tile_base.data_ptr(), masks.data_ptr(),
        values.data_ptr(), size, pool,
    )  # fmt: skip
    library.raise_on(code, f"packing codes of {n} x {k}")
    padded = scales.new_ones(tiles * OCTET, scales.shape[1], dtype=torch.bfloat16)
    padded[:n] = scales
    tiled = padded.view(tiles, OCTET, -1).transpose(1, 2).contiguous()
    return IntegerWeight((n, k), masks, tile_base, values, tiled, group_size, bits, kept)


def storage_class(codes: Int8[Tensor, "out in"], bits: int) -> int:
    """`kept` for codes: all where a mask saves no bytes, a fixed count where octets are alike."""
    n, k = codes.shape
    octets = torch.nn.functional.pad(codes != 0, (0, -k % OCTET)).view(n, -1, OCTET)
    counts = octets.sum(dim=2, dtype=torch.uint8)
    most, mean = int(counts.max()), float(counts.sum(dtype=torch.int64)) / counts.numel()
    fixed, unstructured = 1 + most * bits / 8, 1 + mean * bits / 8
    if min(fixed, unstructured) >= bits:
        return ALL
    return most if 0 < most < ALL and fixed <= FIXED_MARGIN * unstructured else ANY
