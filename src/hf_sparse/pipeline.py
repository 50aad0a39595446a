"""prune: config -> calibration batches -> block by block: statistics, solve, pack -> report.

Works on any module tree, in place; knows nothing of from_pretrained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calibration.blocks import BlockWalk, Visit
from .calibration.experts import observe
from .calibration.forward import input_device
from .calibration.inputs import DensePath, Observed
from .calibration.stages import find_stages, residual_writers
from .calibration.units import Unit, find_units
from .config import SparseConfig
from .environment import Environment
from .errors import CalibrationError
from .facts import DenseFacts
from .jobs import Job, check, plan
from .layers.replace import Places
from .loading import load_calibration
from .logging import get_logger, progress_bar
from .pruned import PrunedLayer, prune_layer
from .report import LayerReport, PruningReport
from .solvers import Solver, make_solver
from .solving import LayerSolver
from .spread import allocate, exactly
from .statistics import OutputMetric
from .targets import select_targets
from .tracking import log_to_current_run

logger = get_logger(__name__)

NO_GRADIENT = "no gradient of the sampled batches reached it: refitted by its inputs alone"
NEVER_CALLED = "the model never called it on the calibration data"


def run(
    model: nn.Module,
    config: SparseConfig,
    load_tokenizer: Callable[[], Any],
    default_dense: Mapping[str, str],
    facts: DenseFacts | None = None,
) -> PruningReport:
    """Prune a model in place and replace its pruned layers by sparse ones.

    Args:
        model: any module tree; linear layers may be offloaded by accelerate.
        config: what to do.
        load_tokenizer: called if the dataset is text.
        default_dense: layers that stay dense unless the config asks for them, with the reason.
        facts: the calibration data, and what other runs over copies of this model have measured
            on them; None to load the config's data.

    Returns:
        What was done to each layer.

    Raises:
        HfSparseError: see `errors`. Data and weights are checked before the model is touched.
    """
    started = time.perf_counter()
    config.check_data()
    selection = select_targets(model, config.targets, config.modules_to_not_convert, default_dense)
    jobs, left_dense = plan(selection.targets, config, dict(selection.left_dense))
    solver = make_solver(config.solver, config)
    check(jobs, solver, config.low_rank)
    units = find_units(model, [job.target.name for job in jobs], config.blocks)
    _tell_no_blocks(model, units, config)
    if facts is None:
        facts = DenseFacts(load_calibration(model, config, load_tokenizer))
    training = model.training
    model.eval()
    try:
        this = _Run(model, config, solver, facts)
        layers = this.prune(jobs, units)
        left_dense |= dict.fromkeys(this.never_called, NEVER_CALLED)
    finally:
        model.train(training)
    _tell_never_called(left_dense, bool(layers))
    record = facts.data.record if facts.data else None
    report = PruningReport(
        layers=tuple(layers),
        left_dense=left_dense,
        data=record,
        seconds=time.perf_counter() - started,
        block_seconds=this.block_seconds,
        model=_name(model),
        config=(config.replaced(dataset=record) if record else config).to_dict(),
        environment=Environment.here(input_device(model)),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    logger.info("%s", report.summary())
    log_to_current_run(report)
    return report


class _Run:
    """One run of `run`: what it is done with, unit by unit."""

    def __init__(
        self,
        model: nn.Module,
        config: SparseConfig,
        solver: Solver,
        facts: DenseFacts,
    ) -> None:
        self._model, self._config, self._facts = model, config, facts
        self._places = Places(model)
        self._solver = LayerSolver(
            solver, config.refit, config.damp_percent, config.grid, config.low_rank
        )
        self._metrics: Mapping[str, OutputMetric] = {}
        self._layers: list[LayerReport] = []
        self.never_called: list[str] = []
        self.block_seconds: dict[str, float] = {}
        self._pruned: dict[str, PrunedLayer] = {}

    @torch.no_grad()
    def prune(self, jobs: Sequence[Job], units: Sequence[Unit]) -> list[LayerReport]:
        """Solve all layers and replace them; returns their reports in the order of solving."""
        self._blocks = {name: unit.name for unit in units for name in unit.targets}
        jobs = self._prepared(jobs, units)
        self._clock = time.perf_counter()
        with progress_bar(len(jobs), "Pruning") as bar:
            for label, layer in self._solve_all(jobs, units):
                bar.set_description(f"Pruning: {label}", refresh=False)
                bar.set_postfix_str(layer.brief(), refresh=False)
                bar.update()
        self._pack()
        return self._layers

    def _prepared(self, jobs: Sequence[Job], units: Sequence[Unit]) -> Sequence[Job]:
        """What has to be known of the whole model before the first layer is touched."""
        config = self._config
        if not jobs:
            return jobs
        metrics: Mapping[str, OutputMetric] = {}
        if config.needs_gradients:
            metrics = self._facts.metrics(self._model, units, config)
        if config.metric == "fisher":
            self._metrics = metrics
        if config.allocation == "uniform":
            return jobs
        targets = {job.target.name: job.target for job in jobs}
        zeros = allocate(self._model, config, targets, units, self._facts, metrics)
        return [Job(job.target, exactly(zeros[job.target.name], job.target.shape)) for job in jobs]

    def _solve_all(
        self, jobs: Sequence[Job], units: Sequence[Unit]
    ) -> Iterator[tuple[str, LayerReport]]:
        """Solve unit by unit; yields where it is, and the report of each layer that is done."""
        if self._facts.data is None:
            for i, job in enumerate(jobs, 1):
                yield f"layer {i} of {len(jobs)}", self._solve(job, None)
                self._pack()
                self._count_seconds(self._blocks[job.target.name])
            return
        by_name = {job.target.name: job for job in jobs}
        keep_dense = self._config.target == "dense"
        walk = BlockWalk(self._model, units, self._facts.batches, keep_dense)
        done = 0
        for visit in walk:
            done += 1  # noqa: SIM113 - enumerate would hold on to the visit
            # The unit before has fed its pruned outputs on: its dense weights can go.
            self._pack()
            for layer in self._solve_unit(visit, by_name):
                yield f"block {done} of {len(units)}", layer
            self._count_seconds(visit.unit.name)
            del visit  # the walk goes on: this unit's inputs must not wait for the next one's
        solved = {layer.name for layer in self._layers} | set(self._pruned)
        self.never_called = [name for name in by_name if name not in solved]

    def _count_seconds(self, block: str) -> None:
        """All time since the last call was a block's."""
        now = time.perf_counter()
        self.block_seconds[block] = self.block_seconds.get(block, 0.0) + now - self._clock
        self._clock = now

    def _solve_unit(self, visit: Visit, jobs: Mapping[str, Job]) -> Iterator[LayerReport]:
        config = self._config
        layers = {name: jobs[name].target.module for name in visit.unit.targets}
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
                    yield self._solve(jobs[name], observed[name])

    @contextmanager
    def _dense_weights(self) -> Iterator[None]:
        """The layers pruned since the last `_pack` have their dense weights."""
        modules = {name: pruned.job.target.module for name, pruned in self._pruned.items()}
        weights = {name: module.weight.data for name, module in modules.items()}  # type: ignore[union-attr]
        try:
            for name, pruned in self._pruned.items():
                modules[name].weight.data = pruned.dense  # type: ignore[union-attr,assignment]
            yield
        finally:
            for name, weight in weights.items():
                modules[name].weight.data = weight  # type: ignore[union-attr,assignment]

    def _solve(self, job: Job, observed: Observed | None) -> LayerReport:
        """Solve one layer and write the pruned weight into it, still dense."""
        name = job.target.name
        metric = self._metrics.get(name)
        keep_dense = self._config.target == "dense"
        pruned = prune_layer(self._solver, job, observed, metric, keep_dense)
        report = replace(pruned.report, block=self._blocks[name])
        if self._config.metric == "fisher" and metric is None:
            report = replace(report, notes=(*report.notes, NO_GRADIENT))
        self._pruned[name] = replace(pruned, report=report)
        return report

    def _pack(self) -> None:
        """Replace the layers pruned since by sparse ones, and complete their reports."""
        for pruned in self._pruned.values():
            self._layers.append(pruned.pack(self._places, self._config.format))
        self._pruned.clear()


def _name(model: nn.Module) -> str:
    """The id that a model was loaded from, or the name of its folder; "" if it has none."""
    name = str(getattr(model, "name_or_path", "") or "")
    return Path(name).resolve().name if Path(name).is_dir() else name


def _tell_no_blocks(model: nn.Module, units: Sequence[Unit], config: SparseConfig) -> None:
    if config.blocks is None and len(units) > 1 and all(u.targets == (u.name,) for u in units):
        logger.warning(
            "no blocks were found in %s, whose modules are %s: each of the %d layers is pruned by "
            "itself. Pass blocks=, regexes of the modules that are to be pruned at once, if there "
            "are any",
            type(model).__name__,
            ", ".join(f"{name} ({type(m).__name__})" for name, m in model.named_children()),
            len(units),
        )


def _tell_never_called(left_dense: Mapping[str, str], any_pruned: bool) -> None:
    names = [name for name, reason in left_dense.items() if reason is NEVER_CALLED]
    text = f"{len(names)} layers stay dense, {NEVER_CALLED}: {', '.join(names[:4])}"
    text += ", ..." if len(names) > 4 else ""
    if names and not any_pruned:
        raise CalibrationError(f"{text}; no other layer was to be pruned")
    if names:
        logger.warning("%s", text)
