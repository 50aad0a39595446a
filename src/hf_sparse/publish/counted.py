"""A report whose zeros and bytes are counted anew in the files of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.headers import PackedLayer, read_folder
from ..core.counting import count_zeros
from ..formats.base import Packed
from ..pruning.report import LayerReport, PruningReport


def counted(report: PruningReport, folder: Path) -> PruningReport:
    """The report's layers with the zeros and bytes that they have in a folder's weight files.

    The report was made when the model was pruned, and perhaps by somebody else. Layers that the
    files don't have are left out. One layer is read at a time.
    """
    if not report.layers:
        return report
    counts = _counts(folder, {layer.name for layer in report.layers})
    layers = (
        _counted(layer, *counts[layer.name]()) for layer in report.layers if layer.name in counts
    )
    return replace(report, layers=tuple(layers))


def _counts(folder: Path, names: set[str]) -> dict[str, Callable[[], tuple[int, int]]]:
    """What counts the zeros and the bytes of each of some layers, sparse or dense."""
    files, packed = read_folder(folder)
    found: dict[str, Callable[[], tuple[int, int]]] = {
        name: partial(_packed, layer) for name, layer in packed.items() if name in names
    }
    for path in files:
        with safe_open(path, framework="pt") as file:
            keys = {key for key in file.keys() if key.endswith(".weight")}  # noqa: SIM118
        for name in names - found.keys():
            if f"{name}.weight" in keys:
                found[name] = partial(_dense, path, f"{name}.weight")
    return found


def _checked(layer: PackedLayer) -> Packed:
    """The packed tensors of a stored layer, whose contents agree."""
    tensors = {key: layer.read(key) for key in layer.format.specs(layer.shape)}
    layer.check(tensors)
    return tensors


def unpacked(layer: PackedLayer) -> Tensor:
    """The weight of a stored layer, in the narrowest dtype that tells what is 0."""
    tensors = _checked(layer)
    values = tensors["weight"].dtype
    dtype = values if values.is_floating_point else torch.float32
    return layer.format.unpack(tensors, layer.shape, dtype)


def _packed(layer: PackedLayer) -> tuple[int, int]:
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in layer.layout.values()]
    if layer.format.grid is not None:  # several codes may share a byte
        return count_zeros(unpacked(layer)), sum(sizes)
    values = _checked(layer)["weight"]
    return math.prod(layer.shape) - values.numel() + count_zeros(values), sum(sizes)


def _dense(path: Path, key: str) -> tuple[int, int]:
    with safe_open(path, framework="pt") as file:
        weight: Tensor = file.get_tensor(key)
    return count_zeros(weight), weight.nbytes


def _counted(layer: LayerReport, zeros: int, size: int) -> LayerReport:
    sparsity = zeros / math.prod(layer.shape)
    return replace(layer, zeros=zeros, sparsity=sparsity, bytes_after=size)
