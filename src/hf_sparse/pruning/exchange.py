"""What processes tell each other of the layers that each of them has solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.batches import CalibrationData
from ..config.sparse_config import SparseConfig
from ..core.errors import ConfigError
from ..core.grids import Grid, QuantizedWeight, Scales
from ..core.input_threshold import InputThreshold
from ..core.low_rank import LowRank
from ..core.processes import Processes
from .one_layer import PrunedLayer
from .plan import LayerPlan
from .report import LayerReport

Solved = tuple[PrunedLayer, Tensor]


@dataclass(frozen=True)
class _Head:
    """Of a solved layer: its report, its grid, what tensors follow, its inputs' threshold."""

    report: LayerReport
    grid: Grid | None
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    threshold: InputThreshold | None


def check_alike(
    processes: Processes,
    config: SparseConfig,
    data: CalibrationData | None,
    layers: Sequence[str],
) -> None:
    """Can these processes prune together?

    Raises:
        ConfigError: not with this config, or there are too few batches.
        ProcessError: they prune different things.
    """
    if processes.size == 1:
        return
    if config.experts is not None:
        raise ConfigError(
            f"experts={config.experts} is chosen by one process: remove experts first, in one, and "
            f"prune what that saved in {processes.size}"
        )
    if data is not None and len(data.batches) < processes.size:
        raise ConfigError(
            f"{len(data.batches)} batches can't be split over {processes.size} processes: pass a "
            f"smaller batch_size (it is {config.batch_size}) or more samples, or start fewer"
        )
    settings = config.replaced(dataset=data.record) if data else config
    asked = {f"the config's {key}": value for key, value in settings.to_dict().items()}
    processes.check_same(asked | {"the list of layers": list(layers)})


def exchange(
    processes: Processes,
    own: Mapping[str, Solved],
    plans: Mapping[str, LayerPlan],
    names: Sequence[str],
) -> dict[str, Solved]:
    """Hand on the layers that this process has solved and take the others'.

    Args:
        processes: all of them call this, after the same layers.
        own: what this one has solved, with the weight to write into the layer.
        plans: of all layers.
        names: in the order in which the result has them.

    Raises:
        ProcessError: a process has failed, or is gone.
    """
    heads = processes.gather({name: _head(*solved) for name, solved in own.items()})
    found = dict(own)
    for owner, theirs in enumerate(heads):
        for name, head in theirs.items():
            plan = plans[name]
            if owner == processes.rank:
                tensors = _tensors(*own[name])
            else:
                with plan.target.weight() as weight:
                    device = weight.device
                kinds = head.tensors.items()
                tensors = {k: torch.empty(s, dtype=t, device=device) for k, (s, t) in kinds}
            for tensor in tensors.values():
                processes.send(tensor, owner)
            if owner != processes.rank:
                found[name] = _layer(plan, head, tensors)
    return {name: found[name] for name in names}


def _head(pruned: PrunedLayer, weight: Tensor) -> _Head:
    grid = pruned.quantized.scales.grid if pruned.quantized else None
    tensors = _tensors(pruned, weight)
    kinds = {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in tensors.items()}
    return _Head(pruned.report, grid, kinds, pruned.threshold)


def _tensors(pruned: PrunedLayer, weight: Tensor) -> dict[str, Tensor]:
    """All that a layer is made of, by name; contiguous."""
    parts: dict[str, Tensor | None] = {"weight": weight, "sparse": pruned.sparse}
    if pruned.quantized:
        scales = pruned.quantized.scales
        parts |= {"codes": pruned.quantized.codes, "scale": scales.scale, "zero": scales.zero}
    if pruned.low_rank:
        parts |= {"b": pruned.low_rank.b, "a": pruned.low_rank.a}
    return {name: tensor.contiguous() for name, tensor in parts.items() if tensor is not None}


def _layer(plan: LayerPlan, head: _Head, tensors: Mapping[str, Tensor]) -> Solved:
    quantized = low_rank = None
    if head.grid is not None:
        scales = Scales(head.grid, tensors["scale"], tensors.get("zero"))
        quantized = QuantizedWeight(tensors["codes"], scales)
    if "a" in tensors:
        low_rank = LowRank(tensors["b"], tensors["a"])
    sparse = tensors.get("sparse")
    pruned = PrunedLayer(plan, head.report, None, quantized, sparse, low_rank, head.threshold)
    return pruned, tensors["weight"]
