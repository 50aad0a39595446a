"""prune: config -> calibration batches -> block by block: statistics, solve, pack -> report.

Works on any module tree, in place; knows nothing of from_pretrained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.block_walk import BlockWalk, Visit
from ..calibration.experts import observe
from ..calibration.feeding_order import find_stages, residual_writers
from ..calibration.forward import input_device
from ..calibration.layer_inputs import DensePath, Observed
from ..calibration.load import load_calibration
from ..config.sparse_config import SparseConfig
from ..core.errors import CalibrationError
from ..core.logging import get_logger, progress_bar
from ..core.statistics import OutputMetric
from ..kernels.machine import Environment
from ..layers.blocks import Block, find_blocks
from ..layers.replace import ModuleParents
from ..layers.select import select_targets
from ..solvers import Solver, make_solver
from ..solvers.layer_solver import LayerSolver
from .dense_measurements import DenseMeasurements
from .one_layer import PrunedLayer, prune_layer
from .plan import LayerPlan, check_plans, plan_layers
from .report import LayerReport, PruningReport
from .sparsity_per_layer import allocate, exactly
from .tracking import log_to_current_run

logger = get_logger(__name__)

NO_GRADIENT = "no gradient of the sampled batches reached it: refitted by its inputs alone"
NEVER_CALLED = "the model never called it on the calibration data"


def run(
    model: nn.Module,
    config: SparseConfig,
    load_tokenizer: Callable[[], Any],
    default_dense: Mapping[str, str],
    measurements: DenseMeasurements | None = None,
) -> PruningReport:
    """Prune a model in place and replace its pruned layers by sparse ones.

    Args:
        model: any module tree; linear layers may be offloaded by accelerate.
        config: what to do.
        load_tokenizer: called if the dataset is text.
        default_dense: layers that stay dense unless the config asks for them, with the reason.
        measurements: the calibration data, and what other runs over copies of this model have
            measured on them; None to load the config's data.

    Returns:
        What was done to each layer.

    Raises:
        HfSparseError: see `errors`. Data and weights are checked before the model is touched.
    """
    started = time.perf_counter()
    config.check_data()
    selection = select_targets(model, config.targets, config.modules_to_not_convert, default_dense)
    plans, left_dense = plan_layers(selection.targets, config, dict(selection.left_dense))
    solver = make_solver(config.solver, config)
    check_plans(plans, solver, config.low_rank)
    blocks = find_blocks(model, [plan.target.name for plan in plans], config.blocks)
    _tell_no_blocks(model, blocks, config)
    if measurements is None:
        measurements = DenseMeasurements(load_calibration(model, config, load_tokenizer))
    training = model.training
    model.eval()
    try:
        this = _Run(model, config, solver, measurements)
        layers = this.prune(plans, blocks)
        left_dense |= dict.fromkeys(this.never_called, NEVER_CALLED)
    finally:
        model.train(training)
    _tell_never_called(left_dense, bool(layers))
    record = measurements.data.record if measurements.data else None
    report = PruningReport(
        layers=tuple(layers),
        left_dense=left_dense,
        data=record,
        seconds=time.perf_counter() - started,
        block_seconds=this.block_seconds,
        model=_name(model),
        config=(config.replaced(dataset=record) if record else config).to_dict(),
        environment=Environment.here(input_device(model)),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    logger.info("%s", report.summary())
    log_to_current_run(report)
    return report


class _Run:
    """One run of `run`: what it is done with, block by block."""

    def __init__(
        self,
        model: nn.Module,
        config: SparseConfig,
        solver: Solver,
        measurements: DenseMeasurements,
    ) -> None:
        self._model, self._config, self._facts = model, config, measurements
        self._parents = ModuleParents(model)
        self._solver = LayerSolver(
            solver, config.refit, config.damp_percent, config.grid, config.low_rank
        )
        self._metrics: Mapping[str, OutputMetric] = {}
        self._layers: list[LayerReport] = []
        self.never_called: list[str] = []
        self.block_seconds: dict[str, float] = {}
        self._pruned: dict[str, PrunedLayer] = {}

    @torch.no_grad()
    def prune(self, plans: Sequence[LayerPlan], blocks: Sequence[Block]) -> list[LayerReport]:
        """Solve all layers and replace them; returns their reports in the order of solving."""
        self._blocks = {name: block.name for block in blocks for name in block.targets}
        plans = self._prepared(plans, blocks)
        self._clock = time.perf_counter()
        with progress_bar(len(plans), "Pruning") as bar:
            for label, layer in self._solve_all(plans, blocks):
                bar.set_description(f"Pruning: {label}", refresh=False)
                bar.set_postfix_str(layer.brief(), refresh=False)
                bar.update()
        self._pack()
        return self._layers

    def _prepared(self, plans: Sequence[LayerPlan], blocks: Sequence[Block]) -> Sequence[LayerPlan]:
        """What has to be known of the whole model before the first layer is touched."""
        config = self._config
        if not plans:
            return plans
        metrics: Mapping[str, OutputMetric] = {}
        if config.needs_gradients:
            metrics = self._facts.metrics(self._model, blocks, config)
        if config.metric == "fisher":
            self._metrics = metrics
        if config.allocation == "uniform":
            return plans
        targets = {plan.target.name: plan.target for plan in plans}
        zeros = allocate(self._model, config, targets, blocks, self._facts, metrics)
        return [
            LayerPlan(plan.target, exactly(zeros[plan.target.name], plan.target.shape))
            for plan in plans
        ]

    def _solve_all(
        self, plans: Sequence[LayerPlan], blocks: Sequence[Block]
    ) -> Iterator[tuple[str, LayerReport]]:
        """Solve block by block; yields where it is, and the report of each layer that is done."""
        if self._facts.data is None:
            for i, plan in enumerate(plans, 1):
                yield f"layer {i} of {len(plans)}", self._solve(plan, None)
                self._pack()
                self._count_seconds(self._blocks[plan.target.name])
            return
        by_name = {plan.target.name: plan for plan in plans}
        keep_dense = self._config.target == "dense"
        walk = BlockWalk(self._model, blocks, self._facts.batches, keep_dense)
        done = 0
        for visit in walk:
            done += 1  # noqa: SIM113 - enumerate would hold on to the visit
            # The block before has fed its pruned outputs on: its dense weights can go.
            self._pack()
            for layer in self._solve_block(visit, by_name):
                yield f"block {done} of {len(blocks)}", layer
            self._count_seconds(visit.block.name)
            del visit  # the walk goes on: this block's inputs must not wait for the next one's
        solved = {layer.name for layer in self._layers} | set(self._pruned)
        self.never_called = [name for name in by_name if name not in solved]

    def _count_seconds(self, block: str) -> None:
        """All time since the last call was a block's."""
        now = time.perf_counter()
        self.block_seconds[block] = self.block_seconds.get(block, 0.0) + now - self._clock
        self._clock = now

    def _solve_block(self, visit: Visit, plans: Mapping[str, LayerPlan]) -> Iterator[LayerReport]:
        config = self._config
        layers = {name: plans[name].target.module for name in visit.block.targets}
        stages = find_stages(visit, layers) if config.stages else [list(layers)]
        factors = residual_writers(visit, layers) if config.target == "dense" else {}
        writers = {name: layers[name] for name in factors}
        for stage in stages:
            dense = None
            if config.target == "dense":
                leave = stage is stages[-1]
                dense = DensePath(self._dense_weights, leave, writers, factors)
            watched = {name: layers[name] for name in stage}
            observed = observe(
                visit,
                watched,
                config.needs,
                dense,
                config.moe_min_tokens,
                config.calibrate_all_experts,
            )
            for name in stage:
                if name in observed:
                    yield self._solve(plans[name], observed[name])

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
        pruned = prune_layer(self._solver, plan, observed, metric, keep_dense)
        report = replace(pruned.report, block=self._blocks[name])
        if self._config.metric == "fisher" and metric is None:
            report = replace(report, notes=(*report.notes, NO_GRADIENT))
        self._pruned[name] = replace(pruned, report=report)
        return report

    def _pack(self) -> None:
        """Replace the layers pruned since by sparse ones, and complete their reports."""
        for pruned in self._pruned.values():
            self._layers.append(pruned.pack(self._parents, self._config.format))
        self._pruned.clear()


def _name(model: nn.Module) -> str:
    """The id that a model was loaded from, or the name of its folder; "" if it has none."""
    name = str(getattr(model, "name_or_path", "") or "")
    return Path(name).resolve().name if Path(name).is_dir() else name


def _tell_no_blocks(model: nn.Module, blocks: Sequence[Block], config: SparseConfig) -> None:
    if config.blocks is None and len(blocks) > 1 and all(u.targets == (u.name,) for u in blocks):
        logger.warning(
            "no blocks were found in %s, whose modules are %s: each of the %d layers is pruned by "
            "itself. Pass blocks=, regexes of the modules that are to be pruned at once, if there "
            "are any",
            type(model).__name__,
            ", ".join(f"{name} ({type(m).__name__})" for name, m in model.named_children()),
            len(blocks),
        )


def _tell_never_called(left_dense: Mapping[str, str], any_pruned: bool) -> None:
    names = [name for name, reason in left_dense.items() if reason is NEVER_CALLED]
    text = f"{len(names)} layers stay dense, {NEVER_CALLED}: {', '.join(names[:4])}"
    text += ", ..." if len(names) > 4 else ""
    if names and not any_pruned:
        raise CalibrationError(f"{text}; no other layer was to be pruned")
    if names:
        logger.warning("%s", text)
