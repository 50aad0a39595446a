"""The layers of a model: solved and packed, block by block."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

import torch
from torch import nn

from ..calibration.forward import missing_input
from ..calibration.layer_statistics import Observed
from ..calibration.stage_walk import walk_stages
from ..config.sparse_config import SparseConfig
from ..core.logging import progress_bar
from ..core.statistics import OutputMetric
from ..layers.blocks import Block
from ..layers.replace import ModuleParents, write_weight
from ..solvers import Solver
from ..solvers.layer_solver import LayerSolver
from .dense_measurements import DenseMeasurements
from .half_pruned import Progress
from .one_layer import PrunedLayer, solve_layer
from .plan import LayerPlan
from .report import LayerReport
from .sparsity_per_layer import allocate, exactly

NO_GRADIENT = "no gradient of the sampled batches reached it: refitted by its inputs alone"
NO_TOKEN = "no calibration token reached it"


class BlockSolver:
    """One run over a model.

    Args:
        model: in eval mode.
        config: what to do.
        solver: its method.
        measurements: the data, and what is known of the dense model.
        progress: is told of each layer that is about to change.

    Attributes:
        layers: reports of the layers that are packed, in the order of solving.
        unreached: layers that stay dense since no token of the data reached them, with the reason.
        block_seconds: what each block took, by its name.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SparseConfig,
        solver: Solver,
        measurements: DenseMeasurements,
        progress: Progress,
    ) -> None:
        self._model, self._config, self._measurements = model, config, measurements
        self._progress = progress
        self._parents = ModuleParents(model)
        self._solver = LayerSolver(
            solver, config.refit, config.damping, config.grid, config.low_rank
        )
        self._metrics: Mapping[str, OutputMetric] = {}
        self._pruned: dict[str, PrunedLayer] = {}  # not packed yet
        self.layers: list[LayerReport] = []
        self.unreached: dict[str, str] = {}
        self.block_seconds: dict[str, float] = {}

    @torch.no_grad()
    def prune(self, plans: Sequence[LayerPlan], blocks: Sequence[Block]) -> None:
        """Solve all layers and replace them.

        Raises:
            HfSparseError: a layer can't be solved.
        """
        self._progress.blocks = blocks
        self._blocks = {name: block.name for block in blocks for name in block.targets}
        plans = self._prepared(plans, blocks)
        self._clock = time.perf_counter()
        steps = closing(self._solve_all(plans, blocks))
        with progress_bar(len(plans), "Pruning") as bar, steps as layers:
            for label, layer in layers:
                bar.set_description(f"Pruning: {label}", refresh=False)
                bar.set_postfix_str(layer.brief(), refresh=False)
                bar.update()
        self._pack()

    def _prepared(self, plans: Sequence[LayerPlan], blocks: Sequence[Block]) -> Sequence[LayerPlan]:
        """What has to be known of the whole model before the first layer is touched."""
        config = self._config
        if not plans:
            return plans
        metrics: Mapping[str, OutputMetric] = {}
        if config.needs_gradients:
            metrics = self._measurements.metrics(self._model, blocks, config)
        if config.metric == "fisher":
            self._metrics = metrics
        if config.allocation == "uniform":
            return plans
        targets = {plan.target.name: plan.target for plan in plans}
        zeros = allocate(self._model, config, targets, blocks, self._measurements, metrics)
        return [
            LayerPlan(plan.target, exactly(zeros[plan.target.name], plan.target.shape))
            for plan in plans
        ]

    def _solve_all(
        self, plans: Sequence[LayerPlan], blocks: Sequence[Block]
    ) -> Generator[tuple[str, LayerReport]]:
        """Solve block by block; yields where it is, and the report of each layer that is done."""
        if self._measurements.data is None:
            for i, plan in enumerate(plans, 1):
                yield f"layer {i} of {len(plans)}", self._solve(plan, None)
                self._pack()
                self._count_seconds(self._blocks[plan.target.name])
            return
        by_name = {plan.target.name: plan for plan in plans}
        batches = self._measurements.batches
        walk = walk_stages(self._model, blocks, batches, self._config, self._dense_weights)
        with closing(walk):
            for done, (block, layers) in enumerate(walk, 1):
                # The block before has fed its pruned outputs on: its dense weights can go.
                self._pack()
                for name, observed in layers:
                    yield f"block {done} of {len(blocks)}", self._solve(by_name[name], observed)
                    del observed
                self._count_seconds(block.name)
        given = {key for batch in batches for key in batch}
        for name in by_name:
            if name not in self._progress.solved:
                missing = missing_input(self._model, name, given)
                has = f", the data have {', '.join(sorted(given))}"
                self.unreached[name] = f"{NO_TOKEN}: {missing}{has}" if missing else NO_TOKEN

    def _count_seconds(self, block: str) -> None:
        """All time since the last call was a block's."""
        now = time.perf_counter()
        self.block_seconds[block] = self.block_seconds.get(block, 0.0) + now - self._clock
        self._clock = now

    @contextmanager
    def _dense_weights(self) -> Iterator[None]:
        """The layers pruned since the last `_pack` have their dense weights."""
        modules = {name: pruned.plan.target.module for name, pruned in self._pruned.items()}
        weights = {name: module.weight.data for name, module in modules.items()}  # type: ignore[union-attr]
        try:
            for name, pruned in self._pruned.items():
                modules[name].weight.data = pruned.dense  # type: ignore[union-attr,assignment]
            yield
        finally:
            for name, weight in weights.items():
                modules[name].weight.data = weight  # type: ignore[union-attr,assignment]

    def _solve(self, plan: LayerPlan, observed: Observed | None) -> LayerReport:
        """Solve one layer and write the pruned weight into it, still dense."""
        name = plan.target.name
        metric = self._metrics.get(name)
        keep_dense = self._config.target == "dense"
        pruned, weight = solve_layer(self._solver, plan, observed, metric, keep_dense)
        report = replace(pruned.report, block=self._blocks[name])
        if self._config.metric == "fisher" and metric is None:
            report = replace(report, notes=(*report.notes, NO_GRADIENT))
        self._pruned[name] = replace(pruned, report=report)
        self._progress.solved.add(name)
        write_weight(plan.target.module, weight)
        return report

    def _pack(self) -> None:
        """Replace the layers pruned since by sparse ones, and complete their reports."""
        for pruned in self._pruned.values():
            self.layers.append(pruned.pack(self._parents, self._config.format))
        self._pruned.clear()
