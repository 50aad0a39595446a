"""One layer, from its dense weight to its pruned one: target, mask, refit, grid, low-rank part.

Sees tensors only. What is done beyond the solver's own work is what the config composes: the
solver doesn't know whether it prunes the layer's weight or the dense model's target, nor that its
values are refitted, nor that part of the target is left to a low-rank part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from ..core.counting import all_finite
from ..core.errors import SolveError
from ..core.grids import Grid
from ..core.patterns import Pattern
from ..core.precision import full_precision
from ..core.statistics import OutputMetric, Statistics
from . import Solution, Solver
from .refinement.low_rank import error_size, fit_low_rank
from .refinement.refit import refit, refit_fisher
from .refinement.rounding import quantize

# Of the sparse and the low-rank part: what one leaves, the other is fitted to.
ALTERNATIONS = 4


@dataclass(frozen=True)
class LayerSolver:
    """The method of a config.

    Attributes:
        solver: chooses the mask and gives first values; rounds them, too, if it can do so in the
            same pass and nothing comes after.
        refit_steps: of PCG in the inputs metric, and as many in the Fisher metric if there is one.
        damping: the refit's and the target's, as the solver's.
        grid: to round what is kept to; None to leave it as it is.
        low_rank: rank of the part beside the sparse one; 0 for none.
    """

    solver: Solver
    refit_steps: int
    damping: float
    grid: Grid | None = None
    low_rank: int = 0

    @full_precision()
    def prepare(self, statistics: Statistics | None) -> None:
        """What can be done before the weight takes memory in fp32.

        Raises:
            SolveError: the Hessian is unusable.
        """
        if statistics is not None and statistics.cross is None:
            self.solver.prepare(statistics)

    @full_precision()
    def solve(
        self,
        weight: Float[Tensor, "out in"],
        statistics: Statistics | None,
        pattern: Pattern,
        residual: Float[Tensor, "out in"] | None = None,
        metric: OutputMetric | None = None,
    ) -> Solution:
        """Prune one layer.

        Args:
            weight: dense, fp32.
            statistics: of the inputs; with a cross moment the target is the dense model's output.
            pattern: how many zeros, and where they may lie.
            residual: what the residual stream before the layer lacks, see `calibration.inputs`.
            metric: of the outputs; refit in it, too.

        Raises:
            SolveError: the Hessian is unusable, or the result isn't finite.
        """
        target = weight
        if statistics is not None and statistics.cross is not None:
            target = dense_target(weight, statistics, self.damping, residual)
        if not self.low_rank:
            return self._sparse(target, statistics, pattern, metric)
        assert statistics is not None
        return self._sparse_and_low_rank(target, statistics, pattern, metric)

    def _sparse_and_low_rank(
        self,
        target: Tensor,
        statistics: Statistics,
        pattern: Pattern,
        metric: OutputMetric | None,
    ) -> Solution:
        """Alternate S = what this method makes of W - L and L = the best fit of W - S.

        The error isn't monotone, since a solver isn't exact: the best iterate is kept. The first
        is no worse than the sparse part alone, whose S it has.
        """
        hessian = statistics.damped_hessian(self.damping)
        goal, least, best = target, math.inf, None
        for _ in range(ALTERNATIONS):
            solution = self._sparse(goal, statistics, pattern, metric)
            low_rank = fit_low_rank(target - solution.weight, hessian, self.low_rank)
            goal = target - low_rank.product()
            error = float(error_size(goal - solution.weight, hessian))
            if best is None or error < least:
                least, best = error, replace(solution, low_rank=low_rank)
        assert best is not None
        return best

    def _sparse(
        self,
        target: Tensor,
        statistics: Statistics | None,
        pattern: Pattern,
        metric: OutputMetric | None,
    ) -> Solution:
        solution = self.solver.solve(target, statistics, pattern)
        if self.refit_steps:
            assert statistics is not None
            solution = self._refitted(solution, target, statistics, metric)
        if not all_finite(solution.weight):
            raise SolveError("the solved weight is not finite: raise damping")
        if self.grid is not None and solution.quantized is None:
            solution = self._rounded(solution, self.grid, statistics)
        return solution

    def _rounded(self, solution: Solution, grid: Grid, statistics: Statistics | None) -> Solution:
        hessian = None
        if statistics is not None and statistics.hessian is not None:
            hessian = statistics.damped_hessian(self.damping)
        quantized = quantize(solution.weight, solution.mask, grid, hessian)
        return replace(solution, weight=quantized.dequantize(), quantized=quantized)

    def _refitted(
        self,
        solution: Solution,
        target: Tensor,
        statistics: Statistics,
        metric: OutputMetric | None,
    ) -> Solution:
        hessian = statistics.damped_hessian(self.damping)
        mask = solution.mask
        weight = refit(solution.weight, target, mask, hessian, self.refit_steps)
        if metric is not None:
            weight = refit_fisher(weight, target, mask, hessian, metric, self.refit_steps)
        return replace(solution, weight=weight)


def dense_target(
    weight: Float[Tensor, "out in"],
    statistics: Statistics,
    damping: float,
    residual: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out in"]:
    """The weight that on the pruned model's inputs X comes closest to the dense model's output.

    Xd being the dense model's inputs, it minimises ||X V' - Xd W'||^2 with a pull towards W of
    the strength of the damping (as in GPTAQ, Li et al. 2025, which corrects the quantisation of
    one column by the error of the inputs):

        V = W + (W (C - H) + residual) Hd^-1,    C = Xd'X / T
    """
    assert statistics.cross is not None
    assert statistics.hessian is not None
    missing = weight @ (statistics.cross - statistics.hessian)
    if residual is not None:
        missing = missing + residual
    upper = statistics.inverse_factor(damping).upper
    return weight + (missing @ upper.T) @ upper
