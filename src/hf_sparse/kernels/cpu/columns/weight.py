"""A weight held by column, dense or packed, and how it is made.

Packed, its rows are cut into panels, and a panel is a tile of the tile layout; `csrc/tiles.h` says
how. So what packs, decodes and checks tiles does so for panels, and only where columns begin is
found beside, by `columns_index`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from .. import library
from ..native_weight import NativeWeight
from ..pack import pack_dense
from ..weight import ROWS, TileWeight

STEP, MOST_ROWS = 32, 2048  # of a panel: what its rows are a multiple of, and how many there may be
PANEL_ROWS = 1024  # of one that is made here: the sums of a product stay in the first cache
PACKED_SHARE = 0.85  # of kept values, above which a mask doesn't pay


@dataclass(frozen=True, eq=False)
class ColumnWeight(NativeWeight):
    """A weight held by column, for products that skip zeros of x.

    transposed: [in, out], contiguous, in fp32, bf16 or fp16; None if the weight is packed
    panels: in tiles of 16 rows, see `sides`; None if the weight is dense
    panel_rows: a multiple of 32, at most 2048; 0 if it is dense
    zero_inputs: share of x that is expected to be 0
    """

    layout: ClassVar[str] = "columns"
    # Several tokens have few zeros in common: packed, one goes after the other.
    ways: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("packed",),
        ("decoded", "packed"),
        ("decoded",),
        ("decoded",),
    )
    shape: tuple[int, int]
    transposed: Tensor | None
    panels: TileWeight | None = None
    panel_rows: int = 0
    zero_inputs: float = 0.0
    dtype: torch.dtype = field(init=False)
    scales: Tensor | None = field(default=None, init=False)
    group_size: int = field(default=0, init=False)
    offsets: Tensor | None = field(default=None, init=False, repr=False)
    _struct: library.ColumnWeight = field(init=False, repr=False)
    address: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        n, k = self.shape
        library.check_dims(n, k)
        struct = library.ColumnWeight(n, k, None, None, None, self.panel_rows, 0)
        if self.panels is None:
            tensor = library.checked(self.transposed, "transposed", library.FLOATS)  # type: ignore[arg-type]
            library.check_shape(tensor, "transposed", (k, n))
            object.__setattr__(self, "transposed", tensor)
            object.__setattr__(self, "dtype", tensor.dtype)
            struct.dense, struct.dense_dtype = tensor.data_ptr(), library.NUMBERS[tensor.dtype]
            self._hold(struct)
            return
        self.check_panel_rows(self.panel_rows)
        offsets = torch.empty(-(-n // self.panel_rows), k, dtype=torch.int32, device="cpu")
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "dtype", self.panels.dtype)
        struct.packed, struct.offsets = self.panels.address, offsets.data_ptr()
        self._hold(struct)
        code = library.library().columns_index(self.address, offsets.data_ptr())
        library.raise_on(code, f"indexing the columns of {n} x {k}")

    @staticmethod
    def check_panel_rows(rows: int) -> None:
        """Raise a ValueError unless a panel may have so many rows."""
        if rows % STEP or not STEP <= rows <= MOST_ROWS:
            raise ValueError(f"panels of {rows} rows: a multiple of {STEP}, {MOST_ROWS} at most")

    @staticmethod
    def sides(shape: tuple[int, int], panel_rows: int) -> tuple[int, int]:
        """Of the matrix whose tiles the panels are: panels * 16, in * panel_rows / 16."""
        return -(-shape[0] // panel_rows) * ROWS, shape[1] * (panel_rows // ROWS)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is resident, by name."""
        if self.panels is not None and self.offsets is not None:
            return {**self.panels.tensors, "offsets": self.offsets}
        return {} if self.transposed is None else {"transposed": self.transposed}

    @property
    def share(self) -> float:
        """How much of the weight is kept, 0 to 1."""
        kept = self.shape[0] * self.shape[1] if self.panels is None else self.panels.count
        return kept / (self.shape[0] * self.shape[1])

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The dense weight in any floating-point dtype."""
        weight = torch.empty(self.shape, dtype=dtype, device="cpu")
        for rows, block in self.blocks(dtype if dtype in library.FLOATS else torch.float32):
            weight[rows] = block.T
        return weight

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "in rows"]]]:
        """Some outputs after others, and their weights; each is gone when the next one comes."""
        n, k = self.shape
        step = self.panel_rows or PANEL_ROWS
        memory = torch.empty(k * step if self.panels else 0, dtype=dtype, device="cpu")
        for panel, first in enumerate(range(0, n, step)):
            rows = slice(first, min(n, first + step))
            if self.panels is None:
                assert self.transposed is not None
                yield rows, self.transposed[:, rows].to(dtype)
                continue
            block = self.panels.decode(dtype, (panel, panel + 1), transposed=True, memory=memory)
            yield rows, block.view(k, step)[:, : rows.stop - first]

    def __reduce__(self) -> tuple[Any, ...]:
        # The struct holds addresses: a copy is made, and checked, anew.
        held = self.shape, self.transposed, self.panels, self.panel_rows, self.zero_inputs
        return ColumnWeight, held


def hold_by_column(weight: Float[Tensor, "out in"], zero_inputs: float = 0.0) -> ColumnWeight:
    """A dense weight by column: packed if it has zeros enough for that to take less."""
    n, k = weight.shape
    weight = library.checked(weight.detach(), "weight", library.FLOATS)
    if torch.count_nonzero(weight) > PACKED_SHARE * weight.numel():
        return ColumnWeight((n, k), weight.T.contiguous(), zero_inputs=zero_inputs)
    count = -(-n // PANEL_ROWS)
    rows = STEP * -(-n // (count * STEP))
    padded = weight.new_zeros(count * rows, k)
    padded[:n] = weight
    tiles = padded.view(count, rows // ROWS, ROWS, k).permute(0, 2, 3, 1)
    panels = pack_dense(tiles.reshape(ColumnWeight.sides((n, k), rows)))
    return ColumnWeight((n, k), None, panels, rows, zero_inputs)
