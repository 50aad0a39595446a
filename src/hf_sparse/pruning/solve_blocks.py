"""The layers of a model: solved and packed, block by block."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..calibration.forward import missing_input
from ..calibration.layer_statistics import Observed
from ..calibration.owners import Owners, solving_cost
from ..calibration.stage_walk import walk_stages
from ..config.sparse_config import SparseConfig
from ..core.freed_memory import freed_memory_returned
from ..core.processes import ALONE, Processes
from ..core.statistics import OutputMetric
from ..layers.blocks import Block
from ..layers.replace import ModuleParents, write_weight
from ..solvers import Solver
from ..solvers.layer_solver import LayerSolver
from .dense_measurements import DenseLayers, DenseMeasurements
from .exchange import Solved, exchange
from .half_pruned import Progress
from .one_layer import PrunedLayer, solve_layer
from .plan import LayerPlan
from .report import LayerReport
from .residence import FinishedBlock, Residence
from .sparsity_per_layer import allocate, exactly
from .work_bar import WorkBar

NO_GRADIENT = "no gradient of the sampled batches reached it: refitted by its inputs alone"
# What was seen of the layers of a stage, by name; None without data.
Stage: TypeAlias = dict[str, Observed] | dict[str, None]
NO_TOKEN = "no calibration token reached it"


class BlockSolver:
    """One run over a model.

    Args:
        model: in eval mode.
        config: what to do.
        solver: its method.
        measurements: the data, and what is known of the dense model.
        progress: is told of each layer that is about to change.
        residence: where blocks are that aren't at work.
        processes: that share the samples and the layers, each with a model of its own.

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
        residence: Residence,
        processes: Processes = ALONE,
    ) -> None:
        self._processes, self._owners = processes, Owners(processes, config.needs)
        self._model, self._config, self._measurements = model, config, measurements
        self._progress, self._residence = progress, residence
        self._parents = ModuleParents(model)
        self._solver = LayerSolver(
            solver, config.refit, config.damping, config.grid, config.low_rank
        )
        self._metrics: Mapping[str, OutputMetric] = {}
        self._pruned: dict[str, PrunedLayer] = {}  # not packed yet
        before = residence.finished
        self.layers: list[LayerReport] = [x for block in before.values() for x in block.layers]
        progress.solved.update(layer.name for layer in self.layers)
        self.unreached: dict[str, str] = {}
        self.block_seconds = {name: block.seconds for name, block in before.items()}

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
        left = [block for block in blocks if block.name not in self._residence.finished]
        bar = WorkBar(
            left,
            len(blocks),
            {p.target.name: solving_cost([p.target.shape], self._config.needs) for p in plans},
            len(self._processes.share(self._measurements.batches)),
            self._processes.is_first,
        )
        with bar.watching():
            self._solve_all(plans, blocks, bar)

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
        dense = DenseLayers(self._model, blocks, targets, self._residence.at_work)
        zeros = self._processes.from_first(
            lambda: allocate(dense, config, self._measurements, metrics)
        )
        return [
            LayerPlan(plan.target, exactly(zeros[plan.target.name], plan.target.shape))
            for plan in plans
        ]

    def _solve_all(self, plans: Sequence[LayerPlan], blocks: Sequence[Block], bar: WorkBar) -> None:
        by_name = {plan.target.name: plan for plan in plans}
        with freed_memory_returned() as give_back, closing(self._walk(blocks)) as walk:
            for block, stages in walk:
                with self._residence.at_work(block):
                    for found in stages:
                        for report in self._solve_stage(found, by_name):
                            bar.solved(report)
                    # It has fed its pruned outputs on: its dense weights can go.
                    packed = self._pack()
                    seconds = self._count_seconds(block.name)
                    self._residence.finish(block, FinishedBlock(packed, seconds))
                give_back()
                bar.finished(block)
        batches = self._measurements.batches
        given = {key for batch in batches for key in batch}
        for name in by_name:
            if name not in self._progress.solved:
                missing = missing_input(self._model, name, given)
                has = f", the data have {', '.join(sorted(given))}"
                self.unreached[name] = f"{NO_TOKEN}: {missing}{has}" if missing else NO_TOKEN

    def _walk(self, blocks: Sequence[Block]) -> Generator[tuple[Block, Iterable[Stage]]]:
        """Each block with its layers' statistics by name, which are None without data, by stage."""
        if self._measurements.data is None:
            finished = self._residence.finished
            for block in blocks:
                if block.name not in finished:
                    layers = {name: self._model.get_submodule(name) for name in block.targets}
                    self._owners.assign([[name] for name in layers], layers)
                    yield block, (dict.fromkeys(layers),)
            return
        yield from walk_stages(
            self._model,
            blocks,
            self._processes.share(self._measurements.batches),
            self._config,
            self._dense_weights,
            self._residence.activations,
            self._owners if self._processes.size > 1 else None,
        )

    def _count_seconds(self, block: str) -> float:
        """All time since the last call was a block's."""
        now = time.perf_counter()
        self.block_seconds[block] = now - self._clock
        self._clock = now
        return self.block_seconds[block]

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

    def _solve_stage(self, found: Stage, plans: Mapping[str, LayerPlan]) -> Iterator[LayerReport]:
        """Solve a stage's layers and write the pruned weights into them, still dense."""
        names = list(found)
        if self._processes.size == 1:
            for name in names:
                yield self._take(name, *self._solve(plans[name], found.pop(name)))
            return
        own: dict[str, Solved] = {}
        for name in filter(self._owners.is_own, names):
            own[name] = self._solve(plans[name], found.pop(name))
        found.clear()
        for name, solved in exchange(self._processes, own, plans, names).items():
            yield self._take(name, *solved)

    def _solve(self, plan: LayerPlan, observed: Observed | None) -> Solved:
        name = plan.target.name
        metric = self._metrics.get(name)
        pruned, weight = solve_layer(
            self._solver, plan, observed, metric, self._config.input_sparsity
        )
        report = replace(pruned.report, block=self._blocks[name])
        if self._config.metric == "fisher" and metric is None:
            report = replace(report, notes=(*report.notes, NO_GRADIENT))
        return replace(pruned, report=report), weight

    def _take(self, name: str, pruned: PrunedLayer, weight: Tensor) -> LayerReport:
        """Write a pruned weight into its layer."""
        if self._config.target == "dense":
            with pruned.plan.target.weight() as before:
                dense = pruned.plan.target.axes.own(before.clone())
            pruned = replace(pruned, dense=dense)
        self._pruned[name] = pruned
        self._progress.solved.add(name)
        write_weight(pruned.plan.target.module, weight)
        return pruned.report

    def _pack(self) -> tuple[LayerReport, ...]:
        """Replace the layers pruned since by sparse ones; their complete reports."""
        packed = [x.pack(self._parents, self._config.format) for x in self._pruned.values()]
        self.layers += packed
        self._pruned.clear()
        return tuple(packed)
