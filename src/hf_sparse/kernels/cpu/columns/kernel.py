"""`columns`: products that skip inputs that are 0, as a kernel and as a torch operator."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ....core.grids import QuantizedWeight
from ....formats import Format
from ....formats.base import Packed
from ...base import Stored
from ...operator import define_product
from ...token_classes import fastest
from .. import library
from ..native_kernel import NativeKernel
from ..product import Product, classes_of
from ..weight import TileWeight
from .weight import ColumnWeight, hold_by_column

_VALUES = {library.NUMBERS[dtype]: dtype for dtype in library.FLOATS}

# The schema's names and order are those of `ColumnKernel.operands`: either the dense weight, or the
# tensors of the packed one's tiles.
_OPERANDS = (
    "Tensor? transposed, Tensor? masks, Tensor? tile_base, Tensor? block_off, Tensor? values, "
    "int out_features, int in_features, int values_dtype, int panel_rows"
)


def _check(*operands: Any) -> Product[ColumnWeight]:
    transposed, *tensors, rows, columns, number, panel_rows = operands
    shape = rows, columns
    if number not in _VALUES:
        raise ValueError(f"values_dtype is {number}, expected one of {_VALUES}")
    if transposed is not None:
        weight = ColumnWeight(shape, transposed)
    else:
        library.check_dims(rows, columns)
        ColumnWeight.check_panel_rows(panel_rows)
        panels = TileWeight(ColumnWeight.sides(shape, panel_rows), _VALUES[number], *tensors)
        weight = ColumnWeight(shape, None, panels, panel_rows)
    return Product(weight, fastest({}, classes_of(weight)))


class ColumnKernel(NativeKernel[ColumnWeight]):
    """Products on the CPU with weights in fp32, bf16 or fp16, dense or packed, held by column."""

    name: ClassVar[str] = "columns"
    # x W' for a weight held by column, in x's dtype. `values_dtype` numbers the weight's as
    # `tile_linear` does. Columns whose input is 0 aren't read, in products of few tokens.
    operators, alive = define_product(
        "column_linear",
        _OPERANDS,
        shape=lambda *weight: weight[5:7],
        check=_check,
        product=lambda x, product: product(x),
        transposed=lambda x, product: x @ product.weight.dense(x.dtype),
    )

    @classmethod
    def _unfit(cls, stored: Stored) -> str | None:
        if not stored.zero_inputs:
            return "skips inputs that are 0, which this layer isn't known to have"
        if stored.format.grid is not None:
            return f"takes values, these are codes of {stored.format.grid.bits} bits"
        if stored.values_dtype not in library.FLOATS:
            return f"has no kernel for values in {stored.values_dtype}"
        return None

    @classmethod
    def _pack(cls, stored: Stored, codes: QuantizedWeight | None) -> ColumnWeight:
        return hold_by_column(stored.dense(stored.values_dtype), stored.zero_inputs)

    @classmethod
    def _path(cls) -> str:
        return list(library.paths())[-1]

    def operands(self) -> tuple[Any, ...]:
        weight = self.product.weight
        number, panels = library.NUMBERS[weight.dtype], weight.panels
        tensors: tuple[Any, ...] = (None,) * 4
        if panels is not None:
            tensors = panels.masks, panels.tile_base, panels.block_off, panels.values
        return weight.transposed, *tensors, *weight.shape, number, weight.panel_rows

    def packed(self, fmt: Format, dtype: torch.dtype) -> Packed:
        return fmt.pack(self.weight(dtype))
