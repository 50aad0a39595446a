"""Integer grids for kept weights: W ~ s (q - z), scales per row and group of columns.

    symmetric   codes c = q - z in [-(2^(b-1) - 1), 2^(b-1) - 1], no zero point
    asymmetric  q in [0, 2^b - 1], zero point z in [0, 2^b - 1], codes c = q - z

Zero is a point of every grid, so that a pruned weight stays 0, and code 0 means weight 0. Scales
are fp32 numbers that bf16 holds exactly, since that is what a file stores: the grid that a solver
rounds to is the grid that is read back.

A wide range rounds the many small weights coarsely for the sake of a few large ones. `Grid.fit`
therefore tries clipped ranges and keeps, for each group, the one with the least squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int16
from torch import Tensor

from .native import call, library_for
from .shapes import row_blocks

# Fractions of the full range that are tried; the first of equally good ones is taken.
CLIPPING = tuple(1 - step / 50 for step in range(21))


@dataclass(frozen=True)
class Grid:
    """What a quantised weight may be rounded to.

    Attributes:
        bits: 8, 4 or 3.
        group_size: consecutive columns that share a scale; None for the whole row. If it does not
            divide the columns, a row's last group is shorter.
        sym: symmetric about 0, without zero points.
    """

    bits: int
    group_size: int | None
    sym: bool

    @property
    def levels(self) -> int:
        """Steps from the lowest to the highest code: 2^b - 2 if symmetric, else 2^b - 1."""
        return (1 << self.bits) - (2 if self.sym else 1)

    def groups(self, columns: int) -> int:
        """Groups of a row."""
        return -(-columns // self.width(columns))

    def width(self, columns: int) -> int:
        """Columns of a full group, at most all there are."""
        return min(self.group_size or columns, columns)

    def fit(
        self,
        weight: Float[Tensor, "out in"],
        mask: Bool[Tensor, "out in"] | None = None,
        importance: Float[Tensor, " in"] | None = None,
        search: bool = True,
    ) -> Scales:
        """Scales, and zero points, for a weight.

        Args:
            weight: what is to be rounded.
            mask: True = kept; what is not kept has no influence. None: all are.
            importance: factor of each column's squared error, >= 0, e.g. diag H. None: all equal.
            search: minimise the squared error over clipped ranges; False takes the full range.

        Returns:
            Scales of every row and group, finite and above 0; 1 where a group has only zeros.
        """
        blocks = row_blocks((len(weight), weight.shape[1]), weight.device)
        fitted = [
            self._fit(weight[rows], None if mask is None else mask[rows], importance, search)
            for rows in blocks
        ]
        scale = torch.cat([scales.scale for scales in fitted])
        zeros = [scales.zero for scales in fitted if scales.zero is not None]
        return Scales(self, scale, torch.cat(zeros) if zeros else None)

    def _fit(
        self, weight: Tensor, mask: Tensor | None, importance: Tensor | None, search: bool
    ) -> Scales:
        """`fit` for some rows."""
        kept = weight.float() if mask is None else weight.float().where(mask, 0)
        grouped = self._grouped(kept)
        low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
        if not search:
            return Scales(self, *self._placed(low, high, 1.0))
        factor = None
        if importance is not None:
            factor = self._grouped(importance.float().unsqueeze(0))
        # All at once: for each ratio there are few, and many operations on few take long.
        scale, zero = self._placed(low, high, low.new_tensor(CLIPPING)[:, None, None])
        tried = [
            Scales(self, scale[i], None if zero is None else zero[i]) for i in range(len(CLIPPING))
        ]
        errors = torch.stack([_squared_error(scales, grouped, factor) for scales in tried])
        best = errors.argmin(dim=0, keepdim=True)  # the first of several
        zero = None if zero is None else zero.gather(0, best)[0]
        return Scales(self, scale.gather(0, best)[0], zero)

    def _grouped(self, matrix: Float[Tensor, "rows in"]) -> Float[Tensor, "rows groups width"]:
        """Groups side by side; a short last one is filled with zeros, which cost nothing."""
        rows, columns = matrix.shape
        width = self.width(columns)
        return F.pad(matrix, (0, -columns % width)).view(rows, -1, width)

    def _placed(
        self, low: Tensor, high: Tensor, ratio: float | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of the grid over ratio * [low, high], where low <= 0 <= high."""
        if self.sym:
            scale = torch.maximum(-low, high) / (self.levels // 2) * ratio
        else:
            scale = (high - low) / self.levels * ratio
        # A range so small that its scale is no normal number is as good as none.
        scale = scale.bfloat16().float()
        scale = scale.where(scale >= torch.finfo(torch.bfloat16).tiny, 1)
        if self.sym:
            return scale, None
        zero = (-low * ratio / scale).round().clamp(0, self.levels)
        return scale, zero.to(torch.int16)


@dataclass(frozen=True)
class Scales:
    """A grid placed on one weight.

    Attributes:
        grid: bits, group size and symmetry.
        scale: fp32, exact in bf16, shape (out, groups).
        zero: zero points, int16, shape (out, groups); None if symmetric.
    """

    grid: Grid
    scale: Float[Tensor, "out groups"]
    zero: Int16[Tensor, "out groups"] | None

    def of_rows(self, rows: slice) -> Scales:
        """Those of some rows."""
        return Scales(self.grid, self.scale[rows], None if self.zero is None else self.zero[rows])

    def column(self, j: int) -> tuple[Float[Tensor, " out"], Int16[Tensor, " out"] | None]:
        """Scale and zero point of each row in column j."""
        group = j // self.grid.group_size if self.grid.group_size else 0
        return self.scale[:, group], None if self.zero is None else self.zero[:, group]

    def round(self, weight: Float[Tensor, "out in"]) -> QuantizedWeight:
        """The nearest point of the grid for each weight; beyond its ends, the end."""
        rows, columns = weight.shape
        codes = torch.empty(rows, columns, dtype=torch.int16, device=weight.device)
        for block in row_blocks((rows, columns), weight.device):
            grouped = self.grid._grouped(weight[block].float())
            codes[block] = self.of_rows(block)._codes(grouped).flatten(1)[:, :columns]
        return QuantizedWeight(codes, self)

    def round_column(self, values: Float[Tensor, " out"], j: int) -> Float[Tensor, " out"]:
        """Column j rounded to the grid, as weights: what `round(...).dequantize()` has there."""
        scale, zero = self.column(j)
        return _nearest(self.grid, values, scale, zero).mul_(scale)

    def _codes(
        self, grouped: Float[Tensor, "out groups width"]
    ) -> Float[Tensor, "out groups width"]:
        zero = None if self.zero is None else self.zero.unsqueeze(2)
        return _nearest(self.grid, grouped, self.scale.unsqueeze(2), zero)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on a grid.

    Attributes:
        codes: q - z, int16, shape (out, in); 0 is weight 0.
        scales: the grid.
    """

    codes: Int16[Tensor, "out in"]
    scales: Scales

    def dequantize(self) -> Float[Tensor, "out in"]:
        """codes * scale in fp32."""
        rows, columns = self.codes.shape
        dense = torch.empty(rows, columns, dtype=torch.float32, device=self.codes.device)
        for block in row_blocks((rows, columns), self.codes.device):
            grouped = self.scales.grid._grouped(self.codes[block].float())
            dense[block] = grouped.mul_(self.scales.scale[block].unsqueeze(2)).flatten(1)[
                :, :columns
            ]
        return dense


def _nearest(grid: Grid, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Codes of the nearest points of the grid, as floats; new memory."""
    codes = values.div(scale).round_()
    if zero is None:
        return codes.clamp_(-(grid.levels // 2), grid.levels // 2)
    return codes.clamp_(-zero, grid.levels - zero)


def _squared_error(scales: Scales, grouped: Tensor, importance: Tensor | None) -> Tensor:
    """Sum of squared rounding errors of each group, shape (out, groups)."""
    scale, zero = scales.scale, scales.zero
    library = library_for(grouped, scale)
    if library is not None and grouped.numel():
        grouped = grouped.contiguous()
        error = torch.empty_like(grouped)
        arrays = zero, scales.grid.levels, importance
        call(library.whole_rounding_errors, *grouped.shape, grouped, scale, *arrays, error)
        return error.sum(dim=2)
    rounded = scales._codes(grouped).mul_(scale.unsqueeze(2))
    error = rounded.sub_(grouped).square_()
    return (error if importance is None else error.mul_(importance)).sum(dim=2)
