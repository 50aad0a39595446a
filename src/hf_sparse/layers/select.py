"""Which weights are pruned: every linear layer but those kept dense, with the reason.

A name or regex selects a module if it matches whole components of the module's name: "q_proj"
matches `layers.0.attn.q_proj` but not `xq_proj`, "layers.1" all below `layers.1` but nothing
below `layers.11`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn

from ..core.errors import TargetError
from ..core.logging import get_logger
from ..core.module_names import matches, near_names
from .adapters import find_adapters
from .axes import Axes
from .prunable import multiplies, why_not_prunable
from .routers import find_routers
from .tied import tied_parameters

logger = get_logger(__name__)


@dataclass(frozen=True)
class Target:
    """A prunable layer: its place in the model and its weight as an (out, in) matrix."""

    name: str
    module: nn.Module

    @property
    def axes(self) -> Axes:
        """The order in which the module keeps the weight's axes."""
        return Axes.of(self.module)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.axes.matrix(self.module.weight).shape  # type: ignore[arg-type]
        return rows, columns

    @contextmanager
    def weight(self) -> Iterator[Float[Tensor, "out in"]]:
        """The weight on its device, also if accelerate has offloaded it; a view, don't write."""
        with torch.no_grad(), align_module_device(self.module):
            weight: Tensor = self.module.weight  # type: ignore[assignment]
            yield self.axes.matrix(weight)


@dataclass(frozen=True)
class Selection:
    """The layers to prune, in the model's order, and why others, and fused experts, stay dense."""

    targets: tuple[Target, ...]
    left_dense: Mapping[str, str]


def select_targets(
    model: nn.Module,
    targets: Sequence[str] | None,
    modules_to_not_convert: Sequence[str] | None,
    default_dense: Mapping[str, str],
) -> Selection:
    """Choose the layers to prune.

    Routers and gates of mixtures stay dense unless a target matches them, whatever
    `modules_to_not_convert` says; what belongs to a PEFT adapter always does.

    Args:
        model: the model to look through.
        targets: regexes of what to prune; None for every linear layer.
        modules_to_not_convert: regexes left dense in place of `default_dense`, as transformers has
            it: what is pruned for that is told. None for `default_dense`.
        default_dense: names of modules that stay dense unless asked for, with the reason.

    Raises:
        TargetError: a regex matches nothing, selects a tied weight, or nothing is left to prune.
        ConfigError: an adapter is merged into its layer.
    """
    ties, routers = tied_parameters(model), find_routers(model)
    layers, reasons = _linear_layers(model)
    left_dense = _fused_experts(model, ties) | reasons
    for pattern in (*(targets or ()), *(modules_to_not_convert or ())):
        require_match(pattern, layers, left_dense)
    chosen: list[Target] = []
    exposed: dict[str, str] = {}
    for name, module in layers.items():
        wanted = targets is not None and any(matches(p, name) for p in targets)
        tie = ties.get(f"{name}.weight")
        reason = None
        if targets is not None and not wanted:
            reason = "no target matches it"
        elif any(matches(p, name) for p in modules_to_not_convert or ()):
            reason = "in modules_to_not_convert"
        elif not wanted and name in routers:
            reason = routers[name]
        elif not wanted and name in default_dense:
            if modules_to_not_convert is None:
                reason = default_dense[name]
            elif tie is None:
                exposed[name] = default_dense[name]
        if reason is None and tie is not None:
            reason = f"its weight is tied to {tie.removesuffix('.weight')}"
            if wanted:
                raise TargetError(
                    f"{name} can't be pruned: {reason}, which stays dense. Take it out of targets"
                )
        if reason is None:
            chosen.append(Target(name, module))
        else:
            left_dense[name] = reason
    if not chosen:
        why = "; ".join(f"{n}: {r}" for n, r in list(left_dense.items())[:5]) or "no linear layer"
        raise TargetError(f"nothing to prune in {type(model).__name__} ({why})")
    _tell_exposed(exposed)
    return Selection(tuple(chosen), left_dense)


def check_patterns(model: nn.Module, patterns: Iterable[str]) -> None:
    """Raise a TargetError if a regex matches no layer of a model, which may have no weights yet.

    Experts that are fused have no layers yet: where there are any, nothing can be said.
    """
    layers, reasons = _linear_layers(model)
    if not _fused_experts(model, {}):
        for pattern in patterns:
            require_match(pattern, layers, reasons)


def _linear_layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """What can be pruned, and by name why the other layers that multiply can't be."""
    adapters = find_adapters(model)
    layers: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if multiplies(module):
            reason = adapters.get(name) or why_not_prunable(module)
            if reason is None:
                layers[name] = module
            else:
                reasons[name] = reason
    return layers, reasons


def _tell_exposed(exposed: Mapping[str, str]) -> None:
    if exposed:
        logger.warning(
            "modules_to_not_convert takes the place of the list of what stays dense by default: %s "
            "will be pruned. Add what is to stay dense",
            "; ".join(f"{name} ({reason})" for name, reason in exposed.items()),
        )


def _fused_experts(model: nn.Module, ties: Mapping[str, str]) -> dict[str, str]:
    """Expert weights that are one 3-D parameter still: no linear layers, so nothing prunes them."""
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim != 3 or "experts" not in name.split("."):
            continue
        if name in ties:
            found[name] = f"its weight is tied to {ties[name]}"
        elif parameter.is_meta:
            found[name] = "fused experts that are offloaded can't be taken apart"
        else:
            found[name] = "fused experts are one 3-D parameter, not linear layers"
    return found


def require_match(
    pattern: str, names: Iterable[str], left_dense: Mapping[str, str] | None = None
) -> None:
    """Raise a TargetError with near names if a pattern matches no layer.

    Args:
        pattern: a regex.
        names: of the linear layers.
        left_dense: others that it might mean, with the reason why they can't be pruned.
    """
    names = list(names)
    if any(matches(pattern, name) for name in names):
        return
    for name, reason in (left_dense or {}).items():
        if matches(pattern, name):
            raise TargetError(f"{pattern!r} matches {name} alone, which can't be pruned: {reason}")
    hint = near_names(pattern, names, "layers")
    raise TargetError(
        f"{pattern!r} matches no linear layer; {hint}. A regex must match whole components of a "
        "name"
    )


def layer_sparsity(sparsities: Mapping[str, float], name: str) -> float | None:
    """The sparsity of the first regex that matches a layer's name; None if none does."""
    return next((s for pattern, s in sparsities.items() if matches(pattern, name)), None)
