"""`quantized`: codes of b bits in place of floating-point values, in any layout.

    weight          (bytes,)       uint8, the layout's values as a stream of b-bit numbers
    weight_scales   (out, groups)  bf16
    weight_zeros    (out, groups)  uint8, only if asymmetric
    weight_...                     the layout's own companions

W[i, j] = s (q - z) with the scale s and the zero point z of row i and group j // group_size. Of the
code c = q - z its low b bits are stored, c mod 2^b. As c lies in the 2^b numbers from -z on, that
tells c; and 0 stands for c = 0 whatever the zero point, as what is not kept. A symmetric grid has
z = 2^(b-1), which makes the stored number c in two's complement; its lowest, -2^(b-1), is not
used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int16
from torch import Tensor

from ..core.bits import pack_numbers, padding_is_zero, unpack_numbers
from ..core.errors import FormatError
from ..core.grids import Grid, QuantizedWeight, Scales
from .base import Format, Layout, Packed, TensorSpec

BITS = (8, 4, 3)
LARGEST_GROUP = 2**31 - 1


@dataclass(frozen=True)
class Quantized(Format):
    """Codes of `grid`, held where `layout` says; see the module's text."""

    grid: Grid
    layout: Layout
    name: ClassVar[str] = "quantized"

    @property
    def label(self) -> str:
        return f"{self.grid.bits}-bit {self.layout.name}"

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], layout: Layout) -> Quantized:
        """Rebuild from `parameters()` without "layout", and from the layout that was named there.

        Raises:
            FormatError: a parameter is missing, unknown or out of range.
        """
        bits, size, sym = (parameters.get(key) for key in ("bits", "group_size", "sym"))
        known = set(parameters) == {"bits", "group_size", "sym"}
        size_fits = size is None or (type(size) is int and 1 <= size <= LARGEST_GROUP)
        if not known or type(bits) is not int or bits not in BITS or not size_fits:
            raise FormatError(
                f"format 'quantized' has parameters {dict(parameters)}, expected bits of "
                f"{', '.join(map(str, BITS))}, a group_size >= 1 or null, and sym"
            )
        if type(sym) is not bool:
            raise FormatError(f"format 'quantized' has sym={sym!r}, expected true or false")
        return cls(Grid(bits, size, sym), layout)

    def parameters(self) -> dict[str, Any]:
        return {
            "bits": self.grid.bits,
            "group_size": self.grid.group_size,
            "sym": self.grid.sym,
            "layout": {"format": self.layout.name, **self.layout.parameters()},
        }

    def specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        specs = self.layout.specs(shape)
        sizes = [size for size in specs["weight"].shape if size is not None]
        fixed = len(sizes) == len(specs["weight"].shape)
        stream = self._stream_bytes(math.prod(sizes)) if fixed else None
        groups = (shape[0], self.grid.groups(shape[1]))
        specs["weight"] = TensorSpec((stream,), torch.uint8)
        specs["weight_scales"] = TensorSpec(groups, torch.bfloat16)
        if not self.grid.sym:
            specs["weight_zeros"] = TensorSpec(groups, torch.uint8)
        return specs

    def pack(self, held: QuantizedWeight) -> Packed:
        """The codes as they are; scales to bf16, which holds them exactly."""
        packed = self.layout.pack(held.codes)
        numbers = packed["weight"].flatten() & ((1 << self.grid.bits) - 1)
        packed["weight"] = pack_numbers(numbers.to(torch.uint8), self.grid.bits)
        packed["weight_scales"] = held.scales.scale.to(torch.bfloat16)
        if held.scales.zero is not None:
            packed["weight_zeros"] = held.scales.zero.to(torch.uint8)
        return packed

    def check(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        bits, stream = self.grid.bits, tensors["weight"]
        count = self.layout.count(tensors, shape)
        if stream.numel() != self._stream_bytes(count):
            raise FormatError(
                f"weight holds {stream.numel()} bytes, {count} kept codes of {bits} bits take "
                f"{self._stream_bytes(count)}"
            )
        if not padding_is_zero(stream.view(1, -1), count * bits):
            raise FormatError(f"weight has bits set behind its {count} codes")
        numbers = unpack_numbers(stream, bits)[:count]
        self.layout.check({**tensors, "weight": numbers}, shape)
        if self.grid.sym and bool((numbers == 2 ** (bits - 1)).any()):
            raise FormatError(
                f"weight holds code {-(2 ** (bits - 1))}, out of range: symmetric codes of {bits} "
                f"bits are {-(self.grid.levels // 2)} to {self.grid.levels // 2}"
            )
        scales = tensors["weight_scales"]
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise FormatError("weight_scales holds scales that are not finite and above 0")
        if not self.grid.sym and int(tensors["weight_zeros"].max()) > self.grid.levels:
            raise FormatError(
                f"weight_zeros holds zero point {int(tensors['weight_zeros'].max())}, out of "
                f"range: {bits} bits have 0 to {self.grid.levels}"
            )

    def quantized(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        """Packed tensors to codes and scales."""
        zero = None if self.grid.sym else tensors["weight_zeros"].to(torch.int16)
        scales = Scales(self.grid, tensors["weight_scales"].float(), zero)
        return QuantizedWeight(self._codes(tensors, shape, zero), scales)

    def unpack(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Float[Tensor, "out in"]:
        return self.quantized(tensors, shape).dequantize().to(dtype)

    def _codes(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], zero: Tensor | None
    ) -> Int16[Tensor, "out in"]:
        """c = (u + z) mod 2^b - z for the stored number u."""
        sizes = self.layout.specs(shape)["weight"].shape
        numbers = unpack_numbers(tensors["weight"], self.grid.bits)
        if None not in sizes:  # else the layout takes as many as it needs
            numbers = numbers[: math.prod(sizes)].view(sizes)  # type: ignore[arg-type]
        if zero is None:  # a number's highest bit is its sign
            above = 8 - self.grid.bits
            signed = (numbers << above).view(torch.int8) >> above
            return self.layout.unpack({**tensors, "weight": signed}, shape, torch.int16)
        stored = self.layout.unpack({**tensors, "weight": numbers}, shape, torch.int16)
        width = self.grid.width(shape[1])
        offset = zero.repeat_interleave(width, dim=1)[:, : shape[1]]
        codes: Tensor = ((stored + offset) & self.grid.levels) - offset
        return codes

    def _stream_bytes(self, count: int) -> int:
        return -(-count * self.grid.bits // 8)
