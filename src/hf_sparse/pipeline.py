"""prune: config -> calibration batches -> block by block: statistics, solve, pack -> report.

Works on any module tree, in place; knows nothing of from_pretrained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .calibration.blocks import BlockWalk, find_units
from .calibration.data import CalibrationData, make_batches
from .calibration.inputs import collect_statistics
from .config import SparseConfig
from .errors import CalibrationError, ConfigError, SolveError
from .formats import Dense, choose_format
from .formats.base import packed_bytes
from .layers.replace import pack_linear, write_weight
from .logging import get_logger, progress_bar
from .patterns import Pattern
from .report import LayerReport, PruningReport
from .solvers import Solver, get_solver, make_solver
from .statistics import Statistics
from .targets import Target, layer_sparsity, require_match, select_targets

logger = get_logger(__name__)

# Of the default for seq_len; the papers calibrate with 2048 tokens.
LONGEST_SEQUENCE = 2048

NEVER_CALLED = "the model never called it on the calibration data"


@dataclass(frozen=True)
class Job:
    """One layer to prune, and to what."""

    target: Target
    pattern: Pattern


def run(
    model: nn.Module,
    config: SparseConfig,
    load_tokenizer: Callable[[], Any],
    default_dense: Mapping[str, str],
) -> PruningReport:
    """Prune a model in place and replace its pruned layers by sparse ones.

    Args:
        model: any module tree; linear layers may be offloaded by accelerate.
        config: what to do.
        load_tokenizer: called if the dataset is text.
        default_dense: layers that stay dense unless the config asks for them, with the reason.

    Returns:
        What was done to each layer.

    Raises:
        HfSparseError: see `errors`. Data and weights are checked before the model is touched.
    """
    started = time.perf_counter()
    config.check_data()
    solver = make_solver(config.method, config)
    selection = select_targets(model, config.targets, config.modules_to_not_convert, default_dense)
    jobs, left_dense = _plan(selection.targets, config, dict(selection.left_dense))
    _check_weights(jobs)
    data = None if config.dataset is None else _load_data(model, config, load_tokenizer)
    training = model.training
    model.eval()
    layers: list[LayerReport] = []
    solved: list[tuple[Job, LayerReport]] = []
    try:
        with torch.no_grad(), progress_bar(len(jobs), "Pruning") as bar:
            for label, unit_jobs, statistics in _units(model, jobs, solver, data):
                # The unit before has fed its pruned outputs on: its dense weights can go.
                layers += _pack(model, solved, config)
                solved = []
                for job in unit_jobs:
                    if data is not None and job.target.name not in statistics:
                        left_dense[job.target.name] = NEVER_CALLED
                        bar.update()
                        continue
                    layer = _solve(solver, job, statistics.get(job.target.name))
                    solved.append((job, layer))
                    bar.set_description(f"Pruning: {label}", refresh=False)
                    bar.set_postfix_str(layer.brief(), refresh=False)
                    bar.update()
            layers += _pack(model, solved, config)
    finally:
        model.train(training)
    _tell_never_called(left_dense, bool(layers))
    record = data.record if data else None
    report = PruningReport(tuple(layers), left_dense, record, time.perf_counter() - started)
    logger.info("%s", report.summary())
    return report


def _plan(
    targets: Sequence[Target], config: SparseConfig, left_dense: dict[str, str]
) -> tuple[list[Job], dict[str, str]]:
    """Give each target its pattern; those whose sparsity is 0 or not given stay dense."""
    sparsities = config.sparsity
    if isinstance(sparsities, Mapping):
        for pattern in sparsities:
            require_match(pattern, [target.name for target in targets])
    jobs = []
    for target in targets:
        if isinstance(sparsities, Mapping):
            sparsity = layer_sparsity(sparsities, target.name)
        else:
            sparsity = sparsities
        if sparsity is None and not get_solver(config.method).chooses_pattern:
            left_dense[target.name] = "no regex of sparsity matches it"
        elif sparsity == 0:
            left_dense[target.name] = "its sparsity is 0"
        else:
            jobs.append(Job(target, config.layer_pattern(sparsity or 0.0)))
    return jobs, left_dense


def _check_weights(jobs: Sequence[Job]) -> None:
    for job in jobs:
        with job.target.weight() as weight:
            if not bool(torch.isfinite(weight).all()):
                raise SolveError(
                    f"layer {job.target.name}: its weight holds NaN or infinite values; the model "
                    "was left as it was"
                )


def _load_data(
    model: nn.Module, config: SparseConfig, load_tokenizer: Callable[[], Any]
) -> CalibrationData:
    longest, vocab_size = _limits(model)
    if config.seq_len is not None and longest is not None and config.seq_len > longest:
        raise ConfigError(
            f"seq_len={config.seq_len} is longer than the {longest} positions that the model has"
        )
    data = make_batches(
        config.dataset,
        load_tokenizer,
        num_samples=config.num_samples,
        seq_len=config.seq_len or min(LONGEST_SEQUENCE, longest or LONGEST_SEQUENCE),
        batch_size=config.batch_size,
        seed=config.seed,
        vocab_size=vocab_size,
    )
    if data.record.count is not None and data.record.count < config.num_samples:
        logger.warning(
            "the calibration data gave %d samples, fewer than num_samples=%d",
            data.record.count,
            config.num_samples,
        )
    return data


def _limits(model: nn.Module) -> tuple[int | None, int | None]:
    """Positions and vocabulary that the model's config and embedding tell of."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    embedding = None
    if hasattr(model, "get_input_embeddings"):
        try:
            embedding = model.get_input_embeddings()  # type: ignore[operator]
        except NotImplementedError:
            embedding = None
    vocab = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None
    return (longest if isinstance(longest, int) and longest > 0 else None), vocab


def _units(
    model: nn.Module, jobs: Sequence[Job], solver: Solver, data: CalibrationData | None
) -> Iterator[tuple[str, list[Job], Mapping[str, Statistics]]]:
    """What is pruned together, in order: a label, the jobs, their statistics if there are data."""
    if data is None:
        for i, job in enumerate(jobs, 1):
            yield f"layer {i} of {len(jobs)}", [job], {}
        return
    by_name = {job.target.name: job for job in jobs}
    units = find_units(model, list(by_name))
    for i, visit in enumerate(BlockWalk(model, units, data.batches), 1):
        layers = {name: by_name[name].target.module for name in visit.unit.targets}
        statistics = collect_statistics(visit, layers, solver.needs)
        yield f"block {i} of {len(units)}", [by_name.pop(name) for name in layers], statistics
    yield "never called", list(by_name.values()), {}


def _tell_never_called(left_dense: Mapping[str, str], any_pruned: bool) -> None:
    names = [name for name, reason in left_dense.items() if reason is NEVER_CALLED]
    text = f"{len(names)} layers stay dense, {NEVER_CALLED}: {', '.join(names[:4])}"
    text += ", ..." if len(names) > 4 else ""
    if names and not any_pruned:
        raise CalibrationError(f"{text}; no other layer was to be pruned")
    if names:
        logger.warning("%s", text)


def _solve(solver: Solver, job: Job, statistics: Statistics | None) -> LayerReport:
    """Solve one layer and write the pruned weight into it, still dense."""
    started = time.perf_counter()
    name = job.target.name
    with job.target.weight() as weight:
        dtype, device = weight.dtype, weight.device
        before = weight.float()
        if statistics is not None and statistics.sample.device != device:
            raise CalibrationError(
                f"layer {name}: weight on {device}, inputs on {statistics.sample.device}"
            )
        try:
            solution = solver.solve(before, statistics, job.pattern)
        except SolveError as error:
            raise SolveError(f"layer {name}: {error}") from None
        after = solution.weight.to(dtype)
        if not bool(torch.isfinite(after).all()):
            raise SolveError(f"layer {name}: the solved weight overflows {dtype}")
        relative_error = statistics.relative_error(before, after.float()) if statistics else None
    write_weight(job.target.module, after.T if job.target.transposed else after)
    zeros = after.numel() - int(torch.count_nonzero(after))
    return LayerReport(
        name=name,
        shape=job.target.shape,
        pattern=str(job.pattern),
        format="dense",
        zeros=zeros,
        sparsity=zeros / after.numel(),
        relative_error=relative_error,
        tokens=statistics.tokens if statistics else None,
        seconds=time.perf_counter() - started,
        bytes_before=after.numel() * after.element_size(),
        bytes_after=after.numel() * after.element_size(),
        bytes_resident=after.numel() * after.element_size(),
        kernel="dense",
        notes=solution.notes,
    )


def _pack(
    model: nn.Module, solved: Sequence[tuple[Job, LayerReport]], config: SparseConfig
) -> list[LayerReport]:
    """Replace solved layers by sparse ones; returns their completed reports."""
    reports = []
    for job, report in solved:
        with job.target.weight() as weight:
            fmt = choose_format(weight, job.pattern, config.format)
            if not isinstance(fmt, Dense):
                sparse = pack_linear(model, job.target.module, weight, fmt)
                stored = packed_bytes(sparse.packed)  # before a kernel takes the weight over
                sparse.resolve()
                report = replace(
                    report,
                    format=fmt.name,
                    bytes_after=stored,
                    bytes_resident=sparse.resident_bytes(),
                    kernel=sparse.trace[-1].kernel,
                )
        reports.append(report)
    return reports
