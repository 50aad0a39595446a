"""Pictures of masks that stay small: how dense each part of a weight is, and one corner exactly."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ...checkpoint.headers import read_folder
from ...core.logging import progress_bar
from ...layers import SparseLinear, sparse_layers
from ..counted import unpacked

GRID = 48  # parts a side
CORNER = 128  # weights a side
LAYERS = 256  # that a page shows at most: 6 kB each


@dataclass(frozen=True)
class MaskView:
    """What a page shows of a layer's mask.

    Attributes:
        name: the layer's.
        shape: (out, in).
        grid: (rows, columns) of parts; at most 48 each, of equal size but for a row or column.
        density: fraction kept of each part in 255ths, rows of the grid in a row.
        corner: (rows, columns) of the first weights, at most 128 each.
        bits: 1 for each of them that is kept, rows in a row, the highest bit of a byte first.
    """

    name: str
    shape: tuple[int, int]
    grid: tuple[int, int]
    density: bytes
    corner: tuple[int, int]
    bits: bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, bytes in base 64."""
        return {
            "name": self.name,
            "shape": self.shape,
            "grid": self.grid,
            "density": base64.b64encode(self.density).decode(),
            "corner": self.corner,
            "bits": base64.b64encode(self.bits).decode(),
        }


def view_mask(name: str, weight: Tensor) -> MaskView:
    """The view of a weight, (out, in), dense; what isn't 0 is kept."""
    kept = weight != 0
    rows, columns = (min(GRID, side) for side in kept.shape)
    # A band of rows at a time: no copy of the mask in a wider type.
    bands = kept.tensor_split(rows)
    counts = torch.stack([band.to(torch.int32).sum(0, dtype=torch.int32) for band in bands])
    counts = torch.stack([part.sum(1) for part in counts.tensor_split(columns, dim=1)], dim=1)
    heights = torch.tensor([len(part) for part in torch.arange(kept.shape[0]).tensor_split(rows)])
    widths = torch.tensor([len(part) for part in torch.arange(kept.shape[1]).tensor_split(columns)])
    density = (counts.cpu() * 255 / heights.outer(widths)).round().to(torch.uint8)
    corner = kept[:CORNER, :CORNER].cpu()
    flat = torch.zeros(-(-corner.numel() // 8) * 8, dtype=torch.uint8)
    flat[: corner.numel()] = corner.flatten()
    powers = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    bits = (flat.view(-1, 8) * powers).sum(1).to(torch.uint8)
    return MaskView(
        name,
        (kept.shape[0], kept.shape[1]),
        (rows, columns),
        density.numpy().tobytes(),
        (corner.shape[0], corner.shape[1]),
        bits.numpy().tobytes(),
    )


def read_masks(source: nn.Module | str | os.PathLike[str], layers: Sequence[str]) -> list[MaskView]:
    """The masks of a sparse model, or of a checkpoint's folder; of 256 layers at most.

    Only one layer is unpacked at a time, and of a folder only one is read. Of more layers, a choice
    is taken at even distances.

    Args:
        source: the model or the folder.
        layers: names of the layers wanted, in the order wanted; those that are dense are left out.

    Raises:
        CheckpointError: a file of the folder is damaged.
    """
    weights = _of_model(source) if isinstance(source, nn.Module) else _of_folder(source)
    found = [name for name in layers if name in weights]
    count = min(LAYERS, len(found))
    chosen = [found[i * len(found) // count] for i in range(count)]
    views = []
    with progress_bar(count, "Masks") as bar:
        for name in chosen:
            views.append(view_mask(name, weights[name]()))
            bar.update()
    return views


def _of_model(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    return {name: partial(_unpack, layer) for name, layer in sparse_layers(model).items()}


def _of_folder(folder: str | os.PathLike[str]) -> dict[str, Callable[[], Tensor]]:
    _, layers = read_folder(folder)
    return {name: partial(unpacked, layer) for name, layer in layers.items()}


def _unpack(layer: SparseLinear) -> Tensor:
    with align_module_device(layer):  # type: ignore[no-untyped-call]
        return layer.sparse_weight
