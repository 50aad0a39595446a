"""What is to be pruned: each layer with its pattern, and what is checked before the first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .config import SparseConfig
from .errors import ConfigError, SolveError
from .patterns import Pattern
from .solvers import SOLVERS, Solver
from .targets import Target, layer_sparsity, require_match


@dataclass(frozen=True)
class Job:
    """One layer to prune, and to what."""

    target: Target
    pattern: Pattern


def plan(
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
        if sparsity is None and not SOLVERS[config.solver].chooses_pattern:
            left_dense[target.name] = "no regex of sparsity matches it"
        elif sparsity == 0 and config.bits is None:
            left_dense[target.name] = "its sparsity is 0"
        else:
            jobs.append(Job(target, config.layer_pattern(sparsity or 0.0)))
    return jobs, left_dense


def check(jobs: Sequence[Job], solver: Solver, low_rank: int) -> None:
    """Can all of it be done? A ConfigError or SolveError that names the layer if not."""
    _check_low_rank(low_rank, jobs)
    _check_weights(solver, jobs)


def _check_low_rank(rank: int, jobs: Sequence[Job]) -> None:
    smallest = min(jobs, key=lambda job: min(job.target.shape), default=None)
    if smallest is not None and rank > min(smallest.target.shape):
        name, shape = smallest.target.name, smallest.target.shape
        raise ConfigError(
            f"low_rank={rank} is above the smaller side of {name}, whose shape is {shape}: pass at "
            f"most {min(shape)}, or leave the layer out with modules_to_not_convert=[{name!r}]"
        )


def _check_weights(solver: Solver, jobs: Sequence[Job]) -> None:
    for job in jobs:
        try:
            solver.check_shape(job.target.shape)
        except SolveError as error:
            raise SolveError(f"layer {job.target.name}: {error}") from None
        with job.target.weight() as weight:
            if not bool(torch.isfinite(weight).all()):
                raise SolveError(
                    f"layer {job.target.name}: its weight holds NaN or infinite values; the model "
                    "was left as it was"
                )
