"""Gradual pruning: a registered solver chooses the masks of dense layers while they train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config.sparse_config import SparseConfig
from ..core.errors import SolveError, TrainingError
from ..core.statistics import Needs, Statistics
from ..layers.select import Target
from ..pruning.plan import check_plans, plan_layers
from ..solvers import SOLVERS, make_solver
from .input_norms import InputNorms
from .masks import Masks
from .schedule import Cubic, Partial


def check_method(method: object) -> None:
    """Raise a TrainingError that lists the methods unless one can prune while training.

    Those can that need no more than the norms of the inputs and don't choose the pattern.
    """
    known = [
        name
        for name, solver in SOLVERS.items()
        if solver.needs <= Needs.COLUMN_NORMS and not solver.chooses_pattern
    ]
    if method not in known:
        raise TrainingError(
            f"method={method!r} can't prune while training: pass one of {', '.join(known)}"
        )


class GradualPruning:
    """Chooses the masks of a run that prunes while it trains.

    Args:
        model: to prune; dense, without adapters.
        targets: its layers that may be pruned.
        config: method, sparsity and pattern.
        cubic: when, and how far.

    Raises:
        TrainingError: the model has adapters, or no target has a sparsity.
        TargetError: a regex of `config.sparsity` matches no target.
        SolveError: the method can't prune a layer.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], config: SparseConfig, cubic: Cubic
    ) -> None:
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise TrainingError(
                f"{type(model).__name__} has adapters, what they are attached to is not trained: "
                "merge or unload them to prune while training"
            )
        self.cubic = cubic
        self._method = config.method
        self._solver = make_solver(config.solver, config)
        self._plans, left_dense = plan_layers(targets, config, {})
        if not self._plans:
            name, reason = next(iter(left_dense.items()))
            raise TrainingError(f"no layer is to be pruned, {name} because {reason}")
        check_plans(self._plans, self._solver, low_rank=0)
        self._norms: InputNorms | None = None

    def watch_inputs(self) -> None:
        """Collect from now on what the method needs."""
        if self._solver.needs >= Needs.COLUMN_NORMS:
            self._norms = InputNorms([plan.target for plan in self._plans])

    def stop_watching(self) -> None:
        """Collect no more."""
        if self._norms is not None:
            self._norms.remove()

    def choose(self, step: int, masks: Masks) -> list[Target]:
        """Choose the masks after a step. What earlier masks left out stays out.

        Returns:
            The layers that have masks now.

        Raises:
            TrainingError: a layer has had no input, or the method brings weights back.
        """
        statistics = self._norms.take() if self._norms is not None else {}
        if step >= self.cubic.end:
            self.stop_watching()
        return self._choose(step, masks, statistics)

    def recover(self, step: int, masks: Masks) -> list[Target]:
        """Choose the masks of a resumed run: what they left out is 0, and so it goes first.

        Of the inputs nothing is known, nor needed: all have the same norm.
        """
        statistics = {}
        for plan in self._plans:
            with plan.target.weight() as weight:
                norms = weight.new_ones(weight.shape[1]).float()
            statistics[plan.target.name] = Statistics(1, norms.unsqueeze(0), norms)
        return self._choose(step, masks, statistics)

    def _choose(
        self, step: int, masks: Masks, statistics: Mapping[str, Statistics]
    ) -> list[Target]:
        fraction = self.cubic.fraction(step)
        for plan in self._plans:
            name = plan.target.name
            with plan.target.weight() as weight:
                gone = ~masks[name].to(weight.device) if name in masks else weight == 0
                pattern = Partial.of(plan.pattern, fraction, gone)
                masks[name] = self._mask(name, weight, statistics.get(name), pattern)
        return [plan.target for plan in self._plans]

    def _mask(
        self,
        name: str,
        weight: Float[Tensor, "out in"],
        statistics: Statistics | None,
        pattern: Partial,
    ) -> Bool[Tensor, "out in"]:
        try:
            mask = self._solver.solve(weight.float(), statistics, pattern).mask
        except SolveError as error:
            raise SolveError(f"layer {name}: {error}") from None
        # Scores of 0 and 1 leave the pattern no choice if the zeros are as many as it wants.
        within = (pattern.mask(mask.float(), per_row=per_row) for per_row in (False, True))
        if not any(torch.equal(mask, expected) for expected in within):
            raise TrainingError(
                f"method={self._method!r} gave {name} {int((~mask).sum())} zeros that don't "
                "follow the pattern, or brought pruned weights back: its masks must come from "
                "pattern.mask"
            )
        return mask
