"""`n:m`: n values and one compact index for every group of m consecutive inputs.

    weight          (out, kept)  kept = n * (in // m) + ceil(n * t / m) for a tail of t = in % m
    weight_indices  (out, ceil(groups * b / 8))  uint8, groups = ceil(in / m)

The index of a group says which positions c_1 < ... < c_n (0-based within the group) are kept; it
is their rank in the combinatorial number system, sum over i = 1..n of C(c_i, i), a number below
C(m, n) written in b = ceil(log2 C(m, n)) bits. A row's indices form one bit string (least
significant bit first, no gaps between groups), padded with zeros to whole bytes. This is the
smallest fixed-length code: 3 bits for 2:4 and 7 for 4:8, where a bit mask takes 4 and 8. The
tail's index uses the same b bits; it always fits, since C(t, k_t) <= C(m, n).

A group with fewer than n non-zeros stores zeros as values, at the lowest free positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt8
from torch import Tensor

from ..core.bits import (
    nonzero_bits,
    pack_rows_of_numbers,
    padding_is_zero,
    unpack_bits,
    unpack_rows_of_numbers,
)
from ..core.counting import kept_values
from ..core.errors import FormatError
from ..core.native import on_cpu
from ..core.patterns import NM, Pattern
from ..core.shapes import row_blocks
from .base import Accepted, Layout, Packed, Rejected, TensorSpec, stored_bytes
from .group_ranks import (
    binomial_table,
    choose,
    choose_in_bytes,
    chosen_in_bytes,
    index_bits,
    unrank,
)

# C(32, 16) < 2^31: ranks and the binomials they are made of stay far inside int64.
LARGEST_M = 32
DETECTED_M = (4, 8, 16, 32)
# The integers that hold a group's bits.
_WORDS = {4: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32}


@dataclass(frozen=True)
class NMPacked(Layout):
    """n kept of m; see the module's text for the layout."""

    n: int
    m: int
    name: ClassVar[str] = "n:m"

    @classmethod
    def fits(
        cls, weight: Shaped[Tensor, "out in"], pattern: Pattern, value_bits: int | None = None
    ) -> Accepted | Rejected:
        """The smallest layout whose groups hold all non-zeros, m the pattern's or a usual one."""
        sizes = (pattern.m,) if isinstance(pattern, NM) else DETECTED_M
        if sizes[0] > LARGEST_M:
            return Rejected(f"m = {sizes[0]} is above {LARGEST_M}: use format='bitmask'")
        layouts = [cls(n, m) for m in sizes if (n := _smallest_n(weight, m)) < m]
        if not layouts:
            return Rejected(
                f"no group size of {', '.join(map(str, sizes))} has zeros in every group: "
                "prune with pattern='n:m', or use format='bitmask'"
            )
        sizes_of = {layout: layout._bytes(weight, value_bits) for layout in layouts}
        best = min(layouts, key=sizes_of.__getitem__)
        return Accepted(best, sizes_of[best])

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> NMPacked:
        n, m = parameters.get("n"), parameters.get("m")
        integers = type(n) is int and type(m) is int and len(parameters) == 2  # no bool
        if not integers or not 1 <= n < m <= LARGEST_M:  # type: ignore[operator]
            raise FormatError(
                f"format 'n:m' has parameters {dict(parameters)}, expected integers "
                f"1 <= n < m <= {LARGEST_M}"
            )
        return cls(n, m)  # type: ignore[arg-type]

    def parameters(self) -> dict[str, Any]:
        return {"n": self.n, "m": self.m}

    def specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        kept, indices = self._row_sizes(columns)
        return {
            "weight": TensorSpec((rows, kept), None),
            "weight_indices": TensorSpec((rows, indices), torch.uint8),
        }

    def count(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> int:
        return shape[0] * self._row_sizes(shape[1])[0]

    def pack(self, weight: Shaped[Tensor, "out in"]) -> Packed:
        shape = (weight.shape[0], weight.shape[1])
        blocks = [self._pack_rows(weight[rows]) for rows in row_blocks(shape, weight.device)]
        return {key: torch.cat([block[key] for block in blocks]) for key in blocks[0]}

    def _pack_rows(self, weight: Shaped[Tensor, "rows in"]) -> Packed:
        rows = weight.shape[0]
        if self._fills_bytes(weight, weight.shape[1]):
            chosen, codes = choose_in_bytes(nonzero_bits(weight), self.n, self.m)
            indices = pack_rows_of_numbers(codes, 8 // self.m * self._index_bits)
            return {"weight": kept_values(weight, chosen).view(rows, -1), "weight_indices": indices}
        values, ranks = [], []
        for group, kept in self._groups(weight):
            chosen, found = choose(group.bool(), kept, self._binomials(weight.device))
            values.append(
                kept_values(group.flatten(1), nonzero_bits(chosen.flatten(1))).view(rows, -1)
            )
            ranks.append(found)
        shifts = torch.arange(self._index_bits, device=weight.device)
        bits = ((torch.cat(ranks, dim=1).unsqueeze(-1) >> shifts) & 1).bool().view(rows, -1)
        return {"weight": torch.cat(values, dim=1), "weight_indices": nonzero_bits(bits)}

    def sample(
        self, tensors: Mapping[str, Tensor], dense: Shaped[Tensor, "rows in"], first: int
    ) -> Shaped[Tensor, "..."]:
        indices = tensors["weight_indices"][first : first + len(dense)]
        columns = dense.shape[1]
        blocks = row_blocks((len(dense), columns), dense.device)
        parts = [dense[rows].gather(1, self._columns(indices[rows], columns)) for rows in blocks]
        return torch.cat(parts)

    def check(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        groups = -(-shape[1] // self.m)
        indices = tensors["weight_indices"]
        if not padding_is_zero(indices, groups * self._index_bits):
            raise FormatError(f"weight_indices has bits set behind group {groups} of a row")
        for rows in row_blocks(shape, indices.device):
            codes = self._codes(indices[rows], groups)
            start = 0
            for count, width, kept in self._sections(shape[1]):
                highest = int(codes[:, start : start + count].max())
                limit = math.comb(width, kept)
                if highest >= limit:
                    raise FormatError(
                        f"weight_indices holds index {highest}, out of range: {kept} of {width} "
                        f"positions have {limit} arrangements"
                    )
                start += count

    def unpack(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Shaped[Tensor, "out in"]:
        values, indices = tensors["weight"], tensors["weight_indices"]
        if self._fills_bytes(indices, shape[1]):
            bits = 8 // self.m * self._index_bits
            codes = unpack_rows_of_numbers(indices, shape[1] // 8, bits)
            mask = unpack_bits(chosen_in_bytes(codes, self.n, self.m), shape[1])
            return torch.zeros(shape, dtype=dtype, device="cpu").masked_scatter(
                mask, values.to(dtype)
            )
        dense = torch.zeros(shape, dtype=dtype, device=values.device)
        for rows in row_blocks(shape, values.device):
            columns = self._columns(indices[rows], shape[1])
            dense[rows].scatter_(1, columns, values[rows].to(dtype))
        return dense

    def _fills_bytes(self, tensor: Tensor, columns: int) -> bool:
        """Has each byte of a row's bit mask whole groups, which can be looked up in tables?"""
        return columns % 8 == 0 and 8 % self.m == 0 and on_cpu(tensor)

    @property
    def _index_bits(self) -> int:
        return index_bits(self.n, self.m)

    def _bytes(self, weight: Tensor, value_bits: int | None) -> int:
        rows = weight.shape[0]
        kept, indices = self._row_sizes(weight.shape[1])
        return stored_bytes(rows * kept, weight, value_bits) + rows * indices

    def _row_sizes(self, columns: int) -> tuple[int, int]:
        """Values and index bytes of a row."""
        groups = -(-columns // self.m)
        kept = sum(count * kept for count, _, kept in self._sections(columns))
        return kept, -(-groups * self._index_bits // 8)

    def _sections(self, columns: int) -> list[tuple[int, int, int]]:
        """(groups, width, kept) of a row's full groups and of its tail, where there are any."""
        tail = columns % self.m
        sections = [(columns // self.m, self.m, self.n)]
        sections += [(1, tail, NM(self.n, self.m).kept(tail))] if tail else []
        return [section for section in sections if section[0]]

    def _groups(self, weight: Tensor) -> list[tuple[Tensor, int]]:
        """The weight as (out, groups, width) views, each with the number kept."""
        columns = weight.shape[1]
        full = columns - columns % self.m
        views = []
        for _, width, kept in self._sections(columns):
            part = weight[:, :full] if width == self.m else weight[:, full:]
            views.append((part.reshape(weight.shape[0], -1, width), kept))
        return views

    def _columns(self, indices: Tensor, columns: int) -> Int64[Tensor, "rows kept"]:
        """The column of each value of some rows."""
        codes = self._codes(indices, -(-columns // self.m))
        binomials = self._binomials(indices.device)
        found, group = [], 0
        for groups, width, kept in self._sections(columns):
            positions = unrank(codes[:, group : group + groups], kept, binomials)
            starts = self.m * torch.arange(group, group + groups, device=codes.device)
            found.append((positions.clamp(max=width - 1) + starts[:, None]).flatten(1))
            group += groups
        return torch.cat(found, dim=1)

    def _codes(self, indices: Tensor, groups: int) -> Int64[Tensor, "out groups"]:
        bits = unpack_bits(indices, groups * self._index_bits)
        bits = bits.view(indices.shape[0], groups, self._index_bits).to(torch.int64)
        return (bits << torch.arange(self._index_bits, device=indices.device)).sum(dim=2)

    def _binomials(self, device: torch.device) -> Int64[Tensor, "i c"]:
        return binomial_table(self.n, self.m).to(device)


def _smallest_n(weight: Tensor, m: int) -> int:
    """The smallest n for which every group of m, and the tail, has room for its non-zeros."""
    columns = weight.shape[1]
    tail = columns % m
    full, last = 1, 0  # the most non-zeros of a group, and of a row's tail
    for rows in row_blocks((len(weight), columns), weight.device):
        block = weight[rows]
        if columns >= m:
            full = max(full, _most(nonzero_bits(block[:, : columns - tail]), m))
        if tail:
            last = max(last, int(block[:, columns - tail :].bool().sum(dim=1).max()))
        if full == m:
            break
    while tail and full < m and NM(full, m).kept(tail) < last:
        full += 1
    return full


def _most(bits: UInt8[Tensor, "rows bytes"], m: int) -> int:
    """The most bits that are set in a group of m; rows are whole groups."""
    if m == 4:
        bits = torch.stack([bits & 15, bits >> 4])
    if m in _WORDS and on_cpu(bits):
        return int(np.bitwise_count(bits.contiguous().numpy().view(_WORDS[m])).max())
    return int(unpack_bits(bits, bits.shape[1] * 8 // m * m).view(-1, m).sum(dim=1).max())
