"""One layer of the model: solved, written back, packed; and what the report says of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.layer_statistics import Observed
from ..core.bits import unpack_numbers
from ..core.counting import all_finite, count_zeros
from ..core.errors import CalibrationError, SolveError
from ..core.grids import QuantizedWeight
from ..core.input_threshold import InputThreshold
from ..core.low_rank import LowRank
from ..core.statistics import OutputMetric
from ..formats import Dense, choose_format
from ..formats.base import Format
from ..formats.bitmask import Bitmask
from ..formats.quantized import Quantized
from ..layers import SparseLinear
from ..layers.replace import ModuleParents, give_up_weight, offload_again, pack_linear
from ..solvers import Solution
from ..solvers.layer_solver import LayerSolver
from .plan import LayerPlan
from .report import LayerReport


@dataclass(frozen=True)
class PrunedLayer:
    """A layer that has its pruned weight and isn't packed yet.

    Attributes:
        plan: what was to be done.
        report: of the layer as it is, dense.
        dense: its weight as it was, in the module's orientation, if that was to be kept.
        quantized: the codes of a weight that lies on a grid.
        sparse: (out, in), if the layer has a low-rank part, which its pruned weight then includes.
        low_rank: that part.
        threshold: up to where the layer's inputs count as 0; None if all count.
    """

    plan: LayerPlan
    report: LayerReport
    dense: Tensor | None
    quantized: QuantizedWeight | None
    sparse: Tensor | None
    low_rank: LowRank | None
    threshold: InputThreshold | None = None

    def pack(self, parents: ModuleParents, requested: str) -> LayerReport:
        """Put a sparse layer in its place, in the format that was asked for; the whole report.

        Raises:
            SolveError: the weight as it will be saved hasn't the zeros that it was solved for.
        """
        module, pattern, low_rank = self.plan.target.module, self.plan.pattern, self.low_rank
        with self.plan.target.weight() as whole:
            weight = whole if self.sparse is None else self.sparse
            held = self.quantized or weight
            fmt = choose_format(held, pattern, requested)
            if isinstance(fmt, Dense) and low_rank is None and self.threshold is None:
                self._check_zeros(count_zeros(weight))
                offload_again(module)
                return self.report
            if isinstance(fmt, Dense) and low_rank is not None:
                # Nearly no zeros, but a dense layer has no low-rank part.
                fmt = choose_format(weight, pattern, Bitmask.name)
            sparse = pack_linear(module, held, fmt, low_rank, self.threshold)
            self._check_zeros(_stored_zeros(sparse, fmt, weight))
            parents.replace(module, sparse)
            give_up_weight(module)
            stored = sparse.resident_bytes()  # before a kernel takes the weight over
            sparse.resolve()
        # Of layers that stay in memory the run says later what kernels made of them.
        return replace(
            self.report,
            format=fmt.label,
            kernel="reference",
            bytes_after=stored,
            bytes_resident=stored,
        )

    def _check_zeros(self, zeros: int) -> None:
        if zeros != self.report.zeros:
            name = self.plan.target.name
            raise SolveError(
                f"layer {name} has {zeros} zeros in the weight that would be saved, and "
                f"{self.report.zeros} in the one that was found for it: something else writes to "
                "its weight, e.g. a hook. Remove that, or leave the layer dense with "
                f"modules_to_not_convert=[{name!r}]"
            )


def _stored_zeros(sparse: SparseLinear, fmt: Format, weight: Tensor) -> int:
    """Zeros of a packed layer, in what will be saved; values that lie there as they are, and codes,
    need not be unpacked for it."""
    values = sparse.packed.get("weight")
    # A code times its scale may be less than fp16 can tell from 0.
    if isinstance(fmt, Quantized) and values is not None and weight.dtype is not torch.float16:
        values = unpack_numbers(values, fmt.grid.bits)
    elif values is None or not values.is_floating_point():
        return count_zeros(sparse.sparse_weight)
    return weight.numel() - values.numel() + count_zeros(values)


def solve_layer(
    solver: LayerSolver,
    plan: LayerPlan,
    observed: Observed | None = None,
    metric: OutputMetric | None = None,
    input_sparsity: float | None = None,
) -> tuple[PrunedLayer, Tensor]:
    """Solve one layer: what is known of it, and the weight to write into it, in its orientation.

    With `input_sparsity` that share of its inputs, as a sample of them shows, is to count as 0.

    Raises:
        CalibrationError: the statistics are on another device.
        SolveError: as `LayerSolver.solve`, or the result overflows the layer's dtype.
    """
    started = time.perf_counter()
    name, axes = plan.target.name, plan.target.axes
    statistics = observed.statistics if observed else None
    with plan.target.weight() as weight:
        if statistics is not None and statistics.sample.device != weight.device:
            raise CalibrationError(
                f"layer {name}: weight on {weight.device}, inputs on {statistics.sample.device}"
            )
        residual = observed.residual if observed else None
        dtype = weight.dtype
        try:
            solver.prepare(statistics)
            before = weight.float()
            solution = solver.solve(before, statistics, plan.pattern, residual, metric)
        except SolveError as error:
            raise SolveError(f"layer {name}: {error}") from None
        sparse = solution.weight.to(dtype)
        low_rank = solution.low_rank.to(dtype) if solution.low_rank else None
        whole = sparse if low_rank is None else low_rank.added_to(sparse)
        if not all_finite(whole):
            raise SolveError(f"layer {name}: the solved weight overflows {dtype}")
        relative_error = statistics.relative_error(before, whole.float()) if statistics else None
    threshold = None
    if input_sparsity is not None and statistics is not None:
        threshold = InputThreshold.of(statistics.sample, input_sparsity)
    seconds = time.perf_counter() - started
    report = _report(plan, sparse, solution, observed, relative_error, seconds)
    if threshold is not None:
        note = f"inputs of at most {threshold.value:.4g} count as 0"
        report = replace(report, notes=(*report.notes, note))
    beside = None if low_rank is None else sparse
    pruned = PrunedLayer(plan, report, None, solution.quantized, beside, low_rank, threshold)
    return pruned, axes.own(whole)


def _report(
    plan: LayerPlan,
    sparse: Tensor,
    solution: Solution,
    observed: Observed | None,
    relative_error: float | None,
    seconds: float,
) -> LayerReport:
    """Of a layer that isn't packed yet."""
    zeros = count_zeros(sparse)
    size = sparse.numel() * sparse.element_size()
    return LayerReport(
        name=plan.target.name,
        shape=plan.target.shape,
        pattern=str(plan.pattern),
        format="dense",
        zeros=zeros,
        sparsity=zeros / sparse.numel(),
        relative_error=relative_error,
        tokens=observed.statistics.tokens if observed else None,
        seconds=seconds,
        bytes_before=size,
        bytes_after=size,
        bytes_resident=size,
        kernel="dense",
        notes=solution.notes + ((observed.note,) if observed and observed.note else ()),
    )
