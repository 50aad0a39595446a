"""What is to be pruned: each layer with its pattern, and what is checked before the first one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..config.sparse_config import SparseConfig
from ..core.counting import all_finite
from ..core.errors import ConfigError, SolveError
from ..core.patterns import Pattern
from ..layers.select import Target, layer_sparsity, require_match
from ..solvers import SOLVERS, Solver

# What a weight may consist of.
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LayerPlan:
    """One layer to prune, and to what."""

    target: Target
    pattern: Pattern


def plan_layers(
    targets: Sequence[Target], config: SparseConfig, left_dense: dict[str, str]
) -> tuple[list[LayerPlan], dict[str, str]]:
    """Give each target its pattern; those whose sparsity is 0 or not given stay dense."""
    sparsities = config.sparsity
    if isinstance(sparsities, Mapping):
        for pattern in sparsities:
            require_match(pattern, [target.name for target in targets])
    plans = []
    for target in targets:
        if isinstance(sparsities, Mapping):
            sparsity = layer_sparsity(sparsities, target.name)
        else:
            sparsity = sparsities
        if sparsity is None and not SOLVERS[config.solver].chooses_pattern:
            left_dense[target.name] = "no regex of sparsity matches it"
        elif sparsity == 0 and config.bits is None and config.input_sparsity is None:
            left_dense[target.name] = "its sparsity is 0"
        else:
            plans.append(LayerPlan(target, config.layer_pattern(sparsity or 0.0)))
    return plans, left_dense


def renamed(
    model: nn.Module,
    before: Mapping[str, nn.Module],
    plans: Sequence[LayerPlan],
    left_dense: Mapping[str, str],
) -> tuple[list[LayerPlan], dict[str, str]]:
    """Plans, and reasons to stay dense, of a model that has lost modules or numbers them anew.

    Args:
        model: as it is now.
        before: its modules when the plans were made, by their names then.
        plans: those of modules that are gone are left out.
        left_dense: likewise.
    """
    names = {module: name for name, module in model.named_modules()}
    left = [
        replace(plan, target=Target(names[plan.target.module], plan.target.module))
        for plan in plans
        if plan.target.module in names
    ]
    now = {old: names.get(module) for old, module in before.items()}
    reasons = {now.get(old, old): why for old, why in left_dense.items()}
    return left, {name: why for name, why in reasons.items() if name is not None}


def check_plans(plans: Sequence[LayerPlan], solver: Solver, low_rank: int) -> None:
    """Can shapes like these be pruned? A ConfigError or SolveError that names the layer if not."""
    _check_low_rank(low_rank, plans)
    for plan in plans:
        try:
            solver.check_shape(plan.target.shape)
        except SolveError as error:
            raise SolveError(f"layer {plan.target.name}: {error}") from None


def _check_low_rank(rank: int, plans: Sequence[LayerPlan]) -> None:
    smallest = min(plans, key=lambda plan: min(plan.target.shape), default=None)
    if smallest is not None and rank > min(smallest.target.shape):
        name, shape = smallest.target.name, smallest.target.shape
        raise ConfigError(
            f"low_rank={rank} is above the smaller side of {name}, whose shape is {shape}: pass at "
            f"most {min(shape)}, or leave the layer out with modules_to_not_convert=[{name!r}]"
        )


def check_weights(targets: Iterable[Target]) -> None:
    """Can these weights, which are in memory, be pruned? If not, an error that names the layer."""
    for target in targets:
        with target.weight() as weight:
            _check_kind(target.name, weight)
            if not all_finite(weight):
                raise SolveError(
                    f"layer {target.name}: its weight holds NaN or infinite values; the model "
                    "was left as it was"
                )


def _check_kind(name: str, weight: Tensor) -> None:
    """Raise a ConfigError if a weight isn't an ordinary tensor of real numbers in memory."""
    if weight.is_meta:
        raise ConfigError(
            f"layer {name} is on the meta device, it has no values: load the model's weights first"
        )
    if type(weight) not in (Tensor, torch.nn.Parameter):
        raise ConfigError(
            f"layer {name} holds a {type(weight).__name__}, quantised or spread over processes: "
            "prune the model as it was before that"
        )
    if weight.dtype not in DTYPES:
        raise ConfigError(
            f"layer {name} has weights of {weight.dtype}: convert the model to one of "
            f"{', '.join(map(str, DTYPES))} first, e.g. model.to(torch.bfloat16), with its scales "
            "multiplied in if it has any; or leave the layer dense with "
            f"modules_to_not_convert=[{name!r}]"
        )
