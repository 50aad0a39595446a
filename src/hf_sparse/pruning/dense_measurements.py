"""What pruning has to know of the dense model before it touches it, measured once.

All of it depends on the dense model, the layers to prune and the calibration data alone, so runs
over copies of one model may share it. The statistics that layers are solved with may not be shared:
a layer's inputs come from blocks that are pruned already, by each method in its own way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from ..calibration.batches import Batch, CalibrationData
from ..calibration.block_walk import BlockWalk
from ..calibration.layer_statistics import collect_statistics
from ..calibration.output_gradients import SHARE, collect_metrics
from ..calibration.whole_experts import ExpertStatistics, collect_experts
from ..config.sparse_config import SparseConfig
from ..core.errors import SolveError
from ..core.logging import progress_bar
from ..core.statistics import Needs, OutputMetric, Statistics
from ..layers.blocks import Block, find_blocks
from ..layers.mixtures import Mixture
from ..layers.select import Target
from .allocation import cost_quantiles, outlier_share

T = TypeVar("T")


@dataclass(frozen=True)
class DenseLayers:
    """What is measured.

    Attributes:
        model: the dense model.
        blocks: its blocks, each with the names of its layers to prune.
        targets: the layers to prune, by name.
        at_work: a context in which a block's weights are in memory.
    """

    model: nn.Module
    blocks: Sequence[Block]
    targets: Mapping[str, Target]
    at_work: Callable[[Block], AbstractContextManager[None]]


class DenseMeasurements:
    """Measurements of one dense model on one set of calibration data; each is made once.

    They stay in memory: of each layer about 256 rows of its outputs' length for the metric, in
    fp32, and a few quantiles for the costs.

    Attributes:
        data: the calibration batches; None if there are none.
        reused_seconds: what the measurements that were asked for again took the first time.
    """

    def __init__(self, data: CalibrationData | None) -> None:
        self.data = data
        self.reused_seconds = 0.0
        self._known: dict[Hashable, tuple[Any, float]] = {}

    @property
    def batches(self) -> tuple[Batch, ...]:
        return self.data.batches if self.data else ()

    def metrics(
        self, model: nn.Module, blocks: Sequence[Block], config: SparseConfig
    ) -> Mapping[str, OutputMetric]:
        """The output metric of each layer; see `collect_metrics`."""
        key = ("metrics", _layers(blocks), config.seed)
        return self._once(key, lambda: collect_metrics(model, blocks, self.batches, config.seed))

    def outliers(self, dense: DenseLayers) -> Mapping[str, float]:
        """Each layer's block's share of outliers, on an evenly spaced part of the batches."""
        key = ("outliers", _layers(dense.blocks))
        return self._once(key, lambda: _outliers(dense, self.batches))

    def costs(
        self, dense: DenseLayers, metrics: Mapping[str, OutputMetric], config: SparseConfig
    ) -> Mapping[str, Tensor]:
        """Quantiles of what removing each layer's weights costs, on an evenly spaced part of the
        batches; `metrics` are those of the config's seed."""
        key = ("costs", _layers(dense.blocks), config.seed, config.damping)
        return self._once(key, lambda: _costs(dense, self.batches, metrics, config.damping))

    def experts(
        self, model: nn.Module, mixtures: Mapping[str, Mixture]
    ) -> Mapping[str, ExpertStatistics]:
        """Statistics of the experts of each mixture; those that no token enters are left out."""
        key = ("experts", tuple(mixtures))
        return self._once(key, lambda: _experts(model, mixtures, self.batches))

    def _once(self, key: Hashable, measure: Callable[[], T]) -> T:
        if key in self._known:
            self.reused_seconds += self._known[key][1]
        else:
            started = time.perf_counter()
            measured = measure()
            self._known[key] = measured, time.perf_counter() - started
        value: T = self._known[key][0]
        return value


def _layers(blocks: Sequence[Block]) -> tuple[tuple[str, ...], ...]:
    return tuple((block.name, *block.targets) for block in blocks)


def _experts(
    model: nn.Module, mixtures: Mapping[str, Mixture], batches: Sequence[Batch]
) -> dict[str, ExpertStatistics]:
    """Walk the dense model and collect what its mixtures do."""
    blocks = find_blocks(model, list({m.caller_name: None for m in mixtures.values()}))
    found: dict[str, ExpertStatistics] = {}
    walk = closing(iter(BlockWalk(model, blocks, batches)))
    with walk as visits, progress_bar(len(blocks), "Scoring experts") as bar:
        for visit in visits:
            found |= collect_experts(visit, mixtures)
            del visit
            bar.update()
    return found


def _outliers(dense: DenseLayers, batches: Sequence[Batch]) -> dict[str, float]:
    """Each layer's block's share of outliers."""

    def outliers(name: str, statistics: Statistics) -> float:
        assert statistics.column_norms is not None
        with dense.targets[name].weight() as weight:
            return outlier_share(weight.float(), statistics.column_norms) * weight.numel()

    found = _measured(dense, batches, Needs.COLUMN_NORMS, outliers)
    shares = {}
    for block in dense.blocks:
        names = [name for name in block.targets if name in found]
        size = sum(math.prod(dense.targets[name].shape) for name in names)
        shares.update({name: sum(found[n] for n in names) / size for name in names})
    return shares


def _costs(
    dense: DenseLayers,
    batches: Sequence[Batch],
    metrics: Mapping[str, OutputMetric],
    damping: float,
) -> dict[str, Tensor]:
    """Quantiles of what removing each layer's weights costs."""

    def costs(name: str, statistics: Statistics) -> Tensor | None:
        if name not in metrics:
            return None
        # H^-1 = U'U, so its diagonal is that of U's columns squared.
        inverse_diagonal = statistics.inverse_factor(damping).upper.square().sum(dim=0)
        with dense.targets[name].weight() as weight:
            return cost_quantiles(weight.float(), metrics[name].diagonal, inverse_diagonal)

    found = _measured(dense, batches, Needs.HESSIAN, costs)
    return {name: cost for name, cost in found.items() if cost is not None}


def _measured(
    dense: DenseLayers,
    batches: Sequence[Batch],
    needs: Needs,
    measure: Callable[[str, Statistics], T],
) -> dict[str, T]:
    """Walk the dense model and measure every layer; statistics live for their block alone."""
    used = batches[:: round(1 / SHARE)]
    found: dict[str, T] = {}
    walk = closing(iter(BlockWalk(dense.model, dense.blocks, used)))
    with walk as visits, progress_bar(len(dense.blocks), "Allocating") as bar:
        for visit in visits:
            layers = {name: dense.targets[name].module for name in visit.block.targets}
            with dense.at_work(visit.block):
                observed = collect_statistics(visit, layers, needs)
                leave = visit.leave
                del visit  # nor do its inputs outlive it
                for name in list(observed):
                    try:
                        found[name] = measure(name, observed.pop(name).statistics)
                    except SolveError as error:
                        raise SolveError(f"layer {name}: {error}") from None
                leave()
            bar.update()
    return found
