"""Routers and gates of mixtures of experts: never pruned unless a target names them."""

from __future__ import annotations

import re

from torch import nn

from .axes import Axes
from .experts import SparseExperts
from .prunable import is_prunable

ROUTER_NAME = re.compile(r"rout|gate$|gating|switch|^wg$", re.IGNORECASE)
ROUTER_CLASS = re.compile(r"Router|TopK(Gate|Gating)|MoE\w*Gate|Moe\w*Gate")


def find_routers(model: nn.Module) -> dict[str, str]:
    """Layers that send tokens to experts, with the reason to leave them dense.

    A router is a layer below a module whose class says so, or one that stands beside a module with
    "expert" in its name and gives a score for each expert in there, or one gate for all. Where the
    experts are called otherwise it is told by its own name, and a score for each of several modules
    in a list or dict. It may be a layer, or some that end in one.
    """
    found: dict[str, str] = {}
    for parent_name, parent in model.named_modules():
        prefix = f"{parent_name}." if parent_name else ""
        if parent_name and ROUTER_CLASS.search(type(parent).__name__):
            for name, module in parent.named_modules():
                if is_prunable(module):
                    found[(prefix + name).rstrip(".")] = f"it is part of the router {parent_name}"
        for child, experts in parent.named_children():
            named = "expert" in child.lower()
            scores = _numbers_of_experts(experts) if named else _lengths(experts) - {1}
            for name, module in parent.named_children():
                told = ROUTER_NAME.search(name) or (named and is_prunable(module))
                if module is experts or not told:
                    continue
                layers = {n: m for n, m in module.named_modules(prefix=name) if is_prunable(m)}
                if layers and _outputs(list(layers.values())[-1]) in scores:
                    found |= {prefix + n: f"it routes tokens to {prefix}{child}" for n in layers}
    return found


def _numbers_of_experts(experts: nn.Module) -> set[int]:
    """How many scores a router of these experts may give; 1 is a gate for all."""
    scores = {1, *(len(p) for p in experts.parameters() if p.ndim == 3)} | _lengths(experts)
    return scores | {m.num_experts for m in experts.modules() if isinstance(m, SparseExperts)}


def _lengths(module: nn.Module) -> set[int]:
    """Of the lists and dicts of modules in it."""
    return {len(m) for m in module.modules() if isinstance(m, nn.ModuleList | nn.ModuleDict)}


def _outputs(module: nn.Module) -> int:
    return Axes.of(module).matrix(module.weight).shape[0]  # type: ignore[arg-type]
