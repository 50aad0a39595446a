"""From a model and a config to the number of zeros of every layer: measures, then allocates."""

from __future__ import annotations

from collections.abc import Mapping

from ..config.sparse_config import SparseConfig
from ..core.patterns import Unstructured
from ..core.statistics import OutputMetric
from ..layers.select import layer_sparsity, require_match
from .allocation import Curve, explicit_curves, fisher_curves, meet_budget, owl_curves
from .dense_measurements import DenseLayers, DenseMeasurements

# log costs of fp32 numbers lie within these, and owl's and explicit's t does, too.
LOWEST, HIGHEST = -200.0, 200.0


def exactly(zeros: int, shape: tuple[int, int]) -> Unstructured:
    """The pattern with just that many zeros in a weight of a shape."""
    return Unstructured((zeros + 0.5) / (shape[0] * shape[1]))


def allocate(
    dense: DenseLayers,
    config: SparseConfig,
    measurements: DenseMeasurements,
    metrics: Mapping[str, OutputMetric],
) -> dict[str, int]:
    """Zeros of each layer, by name; together as many as uniform sparsity makes.

    Layers that the measurements behind owl and fisher don't reach get the mean sparsity.
    """
    assert isinstance(config.sparsity, float)
    targets = dense.targets
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
        curves = owl_curves(measurements.outliers(dense), config.sparsity)
    else:
        costs = measurements.costs(dense, metrics, config)
        curves = fisher_curves(costs, config.sparsity)
    if not isinstance(config.allocation, dict):
        missing = {name: config.sparsity for name in targets if name not in curves}
        curves |= explicit_curves(missing)
    return meet_budget(curves, sizes, budget, low, high)
