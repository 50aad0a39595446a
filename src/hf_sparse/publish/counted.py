"""A report whose zeros are counted anew in the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.headers import PackedLayer, read_folder
from ..core.counting import count_zeros
from ..pruning.report import LayerReport, PruningReport


def counted(report: PruningReport, folder: Path) -> PruningReport:
    """The report's layers with the zeros that they have in a folder's weight files.

    The report was made when the model was pruned, and perhaps by somebody else. Layers that the
    files don't have are left out. One layer is read at a time.
    """
    if not report.layers:
        return report
    weights = read_weights(folder, {layer.name for layer in report.layers})
    layers = (
        _counted(layer, weights[layer.name]()) for layer in report.layers if layer.name in weights
    )
    return replace(report, layers=tuple(layers))


def read_weights(folder: Path, names: set[str]) -> dict[str, Callable[[], Tensor]]:
    """What reads each of some layers, sparse or dense, from the files that have it."""
    files, packed = read_folder(folder)
    found: dict[str, Callable[[], Tensor]] = {
        name: partial(unpacked, layer) for name, layer in packed.items() if name in names
    }
    for path in files:
        with safe_open(path, framework="pt") as file:
            keys = {key for key in file.keys() if key.endswith(".weight")}  # noqa: SIM118
        for name in names - found.keys():
            if f"{name}.weight" in keys:
                found[name] = partial(_dense, path, f"{name}.weight")
    return found


def unpacked(layer: PackedLayer) -> Tensor:
    """The weight of a stored layer, in the narrowest dtype that tells what is 0."""
    tensors = {key: layer.read(key) for key in layer.format.specs(layer.shape)}
    layer.check(tensors)
    values = tensors["weight"].dtype
    dtype = values if values.is_floating_point else torch.float32
    return layer.format.unpack(tensors, layer.shape, dtype)


def _dense(path: Path, key: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        weight: Tensor = file.get_tensor(key)
    return weight


def _counted(layer: LayerReport, weight: Tensor) -> LayerReport:
    zeros = count_zeros(weight)
    return replace(layer, zeros=zeros, sparsity=zeros / max(1, weight.numel()))
