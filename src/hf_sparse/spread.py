"""From a model and a config to the number of zeros of every layer: measures, then allocates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from .allocation import (
    Curve,
    cost_quantiles,
    explicit_curves,
    fisher_curves,
    meet_budget,
    outlier_share,
    owl_curves,
)
from .calibration.blocks import BlockWalk, Unit
from .calibration.data import Batch
from .calibration.gradients import SHARE
from .calibration.inputs import collect_statistics
from .config import SparseConfig
from .errors import SolveError
from .logging import progress_bar
from .patterns import Unstructured
from .statistics import Needs, OutputMetric, Statistics
from .targets import Target, layer_sparsity, require_match

# log costs of fp32 numbers lie within these, and owl's and explicit's t does, too.
LOWEST, HIGHEST = -200.0, 200.0

T = TypeVar("T")


def exactly(zeros: int, shape: tuple[int, int]) -> Unstructured:
    """The pattern with just that many zeros in a weight of a shape."""
    return Unstructured((zeros + 0.5) / (shape[0] * shape[1]))


def allocate(
    model: nn.Module,
    config: SparseConfig,
    targets: Mapping[str, Target],
    units: Sequence[Unit],
    batches: Sequence[Batch],
    metrics: Mapping[str, OutputMetric],
) -> dict[str, int]:
    """Zeros of each layer, by name; together as many as uniform sparsity makes.

    owl and fisher measure the dense model on an evenly spaced part of the calibration batches;
    layers that these don't reach get the mean sparsity.
    """
    assert isinstance(config.sparsity, float)
    sizes = {name: target.shape[0] * target.shape[1] for name, target in targets.items()}
    budget = sum(Unstructured(config.sparsity).zeros(size) for size in sizes.values())
    curves: dict[str, Curve]
    low, high = LOWEST, HIGHEST
    if isinstance(config.allocation, dict):
        for regex in config.allocation:
            require_match(regex, targets)
        fixed = {name: layer_sparsity(config.allocation, name) for name in targets}
        curves, low, high = explicit_curves(fixed), 0.0, 1.0
    elif config.allocation == "owl":
        curves = owl_curves(_outliers(model, units, targets, batches), config.sparsity)
    else:
        curves = fisher_curves(
            _costs(model, units, targets, batches, metrics, config.damp_percent), config.sparsity
        )
    if not isinstance(config.allocation, dict):
        missing = {name: config.sparsity for name in targets if name not in curves}
        curves |= explicit_curves(missing)
    return meet_budget(curves, sizes, budget, low, high)


def _outliers(
    model: nn.Module,
    units: Sequence[Unit],
    targets: Mapping[str, Target],
    batches: Sequence[Batch],
) -> dict[str, float]:
    """Each layer's block's share of outliers."""

    def outliers(name: str, statistics: Statistics) -> float:
        assert statistics.column_norms is not None
        with targets[name].weight() as weight:
            return outlier_share(weight.float(), statistics.column_norms) * weight.numel()

    found = _measured(model, units, targets, batches, Needs.COLUMN_NORMS, outliers)
    shares = {}
    for unit in units:
        names = [name for name in unit.targets if name in found]
        size = sum(targets[name].shape[0] * targets[name].shape[1] for name in names)
        shares.update({name: sum(found[n] for n in names) / size for name in names})
    return shares


def _costs(
    model: nn.Module,
    units: Sequence[Unit],
    targets: Mapping[str, Target],
    batches: Sequence[Batch],
    metrics: Mapping[str, OutputMetric],
    damp_percent: float,
) -> dict[str, Tensor]:
    """Quantiles of what removing each layer's weights costs."""

    def costs(name: str, statistics: Statistics) -> Tensor | None:
        if name not in metrics:
            return None
        # H^-1 = U'U, so its diagonal is that of U's columns squared.
        inverse_diagonal = statistics.inverse_factor(damp_percent).upper.square().sum(dim=0)
        with targets[name].weight() as weight:
            return cost_quantiles(weight.float(), metrics[name].diagonal, inverse_diagonal)

    found = _measured(model, units, targets, batches, Needs.HESSIAN, costs)
    return {name: cost for name, cost in found.items() if cost is not None}


def _measured(
    model: nn.Module,
    units: Sequence[Unit],
    targets: Mapping[str, Target],
    batches: Sequence[Batch],
    needs: Needs,
    measure: Callable[[str, Statistics], T],
) -> dict[str, T]:
    """Walk the dense model and measure every layer; statistics live for their unit alone."""
    used = batches[:: round(1 / SHARE)]
    found: dict[str, T] = {}
    with progress_bar(len(units), "Allocating") as bar:
        for visit in BlockWalk(model, units, used):
            layers = {name: targets[name].module for name in visit.unit.targets}
            observed = collect_statistics(visit, layers, needs)
            del visit  # nor do its inputs outlive it
            while observed:
                name, seen = observed.popitem()
                try:
                    found[name] = measure(name, seen.statistics)
                except SolveError as error:
                    raise SolveError(f"layer {name}: {error}") from None
            del seen
            bar.update()
    return found
