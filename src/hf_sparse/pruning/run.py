"""prune: config -> calibration batches -> experts that go -> block by block: statistics, solve,
pack -> report.

Works on any module tree, in place; knows nothing of from_pretrained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration.load import load_calibration
from ..config.sparse_config import SparseConfig
from ..core.errors import CalibrationError
from ..core.evaluation_mode import evaluation_mode
from ..core.input_device import input_device
from ..core.logging import get_logger
from ..core.processes import ALONE, Processes
from ..kernels.machine import Environment
from ..layers import sparse_layers
from ..layers.activations import round_activations
from ..layers.blocks import Block, find_blocks
from ..layers.prefer import prefer
from ..layers.select import select_targets
from ..solvers import make_solver
from .dense_measurements import DenseMeasurements
from .exchange import check_alike
from .half_pruned import Progress
from .plan import LayerPlan, check_plans, check_weights, plan_layers, renamed
from .report import LayerReport, PruningReport
from .residence import Residence
from .solve_blocks import BlockSolver
from .tracking import log_to_current_run
from .whole_experts.run import ExpertPlan

logger = get_logger(__name__)


def run(
    model: nn.Module,
    config: SparseConfig,
    load_tokenizer: Callable[[], Any],
    default_dense: Mapping[str, str],
    progress: Progress,
    measurements: DenseMeasurements | None = None,
    residence: Residence | None = None,
    processes: Processes = ALONE,
) -> PruningReport:
    """Prune a model in place and replace its pruned layers by sparse ones.

    Args:
        model: any module tree; linear layers may be offloaded by accelerate.
        config: what to do.
        load_tokenizer: called if the dataset is text.
        default_dense: layers that stay dense unless the config asks for them, with the reason.
        progress: is told what is done.
        measurements: the calibration data, and what other runs over copies of this model have
            measured on them; None to load the config's data.
        residence: where its blocks are while they aren't at work; None for memory.
        processes: that call this together.

    Returns:
        What was done to each layer.

    Raises:
        HfSparseError: see `errors`. Data and weights are checked before the model is touched.
    """
    started = time.perf_counter()
    residence = residence or Residence()
    config.check_data()
    experts = ExpertPlan.of(model, config)
    selection = select_targets(model, config.targets, config.modules_to_not_convert, default_dense)
    plans, left_dense = plan_layers(selection.targets, config, dict(selection.left_dense))
    solver = make_solver(config.solver, config)
    check_plans(plans, solver, config.low_rank)
    blocks = find_blocks(model, [plan.target.name for plan in plans], config.blocks)
    _tell_no_blocks(model, blocks, config)
    if measurements is None:
        measurements = DenseMeasurements(load_calibration(model, config, load_tokenizer))
    record = measurements.data.record if measurements.data else None
    check_alike(processes, config, measurements.data, [plan.target.name for plan in plans])
    residence.begin(model, blocks, config, record)
    _check_weights(plans, blocks, residence)
    with evaluation_mode(model):
        choice = experts.choose(measurements) if experts else None
        if experts and choice:
            before = dict(model.named_modules())
            progress.solved |= choice.kept.keys()  # from here on the model is touched
            experts.carry_out(choice)
            plans, left_dense = renamed(model, before, plans, left_dense)
            blocks = find_blocks(model, [plan.target.name for plan in plans], config.blocks)
            measurements = DenseMeasurements(measurements.data)  # it is another dense model
        solver_run = BlockSolver(
            model, config, solver, measurements, progress, residence, processes
        )
        if plans:
            solver_run.prune(plans, blocks)
    _tell_unreached(solver_run.unreached, bool(solver_run.layers))
    round_activations(model, config.activations)
    prefer(model, config.prefer)
    report = PruningReport(
        layers=tuple(_as_held(solver_run.layers, model)),
        left_dense=left_dense | solver_run.unreached,
        experts=choice.reports if choice else (),
        data=record,
        seconds=time.perf_counter() - started,
        block_seconds=solver_run.block_seconds,
        model=_name(model),
        config=(config.replaced(dataset=record) if record else config).to_dict(),
        environment=Environment.here(input_device(model)),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    logger.info("%s", report.summary())
    log_to_current_run(report)
    return report


def _as_held(reports: Iterable[LayerReport], model: nn.Module) -> Iterator[LayerReport]:
    """The layers' reports with the kernels that they ended with; not of those that are in files."""
    layers = sparse_layers(model)
    for report in reports:
        layer = layers.get(report.name)
        if layer is not None and not any(t.is_meta for t in layer.buffers()):
            kernel, resident = layer.trace[-1].kernel, layer.resident_bytes()
            report = replace(report, kernel=kernel, bytes_resident=resident)
        yield report


def _name(model: nn.Module) -> str:
    """The id that a model was loaded from, or the name of its folder; "" if it has none."""
    name = str(getattr(model, "name_or_path", "") or "")
    return Path(name).resolve().name if Path(name).is_dir() else name


def _check_weights(
    plans: Sequence[LayerPlan], blocks: Sequence[Block], residence: Residence
) -> None:
    """Look at every weight before one is pruned."""
    targets = {plan.target.name: plan.target for plan in plans}
    for block in blocks:
        if block.name not in residence.finished:
            with residence.at_work(block):
                check_weights(targets[name] for name in block.targets)


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


def _tell_unreached(unreached: Mapping[str, str], any_pruned: bool) -> None:
    """One warning for all layers that no token reached, or an error if there were no others."""
    if not unreached:
        return
    groups: dict[str, list[str]] = {}
    for name, reason in unreached.items():
        groups.setdefault(reason, []).append(name)
    text = f"{len(unreached)} layers stay dense"
    for reason, names in groups.items():
        more = ", ..." if len(names) > 4 else ""
        text += f"; {reason}: {', '.join(names[:4])}{more}"
    text += ". Pass dicts of all inputs that the model takes to include them"
    if not any_pruned:
        raise CalibrationError(f"{text}; no other layer was to be pruned")
    logger.warning("%s", text)
