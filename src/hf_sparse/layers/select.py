"""Which weights are pruned: every linear layer but those kept dense, with the reason.

Linear are `nn.Linear`, transformers' `Conv1D`, and convolutions that are pointwise: linear over the
channels of each position. Other convolutions stay dense.

A name or regex selects a module if it matches whole components of the module's name: "q_proj"
matches `layers.0.attn.q_proj` but not `xq_proj`, "layers.1" all below `layers.1` but nothing
below `layers.11`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..core.errors import TargetError
from ..core.module_names import matches, near_names
from . import SparseLinear
from .axes import Axes
from .tied import tied_parameters

ROUTER_CLASS = re.compile(r"Router|TopK(Gate|Gating)|MoE\w*Gate|Moe\w*Gate")


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


def is_prunable(module: nn.Module) -> bool:
    """A dense linear layer? transformers' Conv1D is told by its two sizes, nx -> nf."""
    if isinstance(module, SparseLinear):
        return False
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return _why_not_pointwise(module) is None
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight and never calls it
    if isinstance(module, nn.Linear):
        return _computes_linear(type(module))  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    sizes = getattr(module, "nx", None), getattr(module, "nf", None)
    return isinstance(weight, Tensor) and tuple(weight.shape) == sizes


def _why_not_pointwise(module: nn.Module) -> str | None:
    """What keeps a convolution from being linear over its channels; None if nothing does."""
    known = next((c for c in (nn.Conv1d, nn.Conv2d) if isinstance(module, c)), None)
    if known is None:
        return f"a {type(module).__name__}"
    if any(size != 1 for size in module.kernel_size):  # type: ignore[union-attr]
        return f"a convolution of kernel size {'x'.join(map(str, module.kernel_size))}"  # type: ignore[arg-type]
    if any(step != 1 for step in module.stride):  # type: ignore[union-attr]
        return f"a convolution of stride {'x'.join(map(str, module.stride))}"  # type: ignore[arg-type]
    if module.groups != 1:
        return f"a convolution of {module.groups} groups"
    if not isinstance(module.padding, str) and any(module.padding):  # type: ignore[arg-type]
        return "a convolution that pads its inputs"
    cls: Any = type(module)
    own = cls.forward is not known.forward or cls._conv_forward is not known._conv_forward
    return f"a {cls.__name__} computes in a way of its own" if own else None


@functools.cache
def _computes_linear(cls: type[nn.Linear]) -> bool:
    """Is what a subclass of `nn.Linear` computes still W x + b? One with state of its own isn't."""
    if cls.forward is nn.Linear.forward:
        return True
    if cls.__init__ is not nn.Linear.__init__:
        return False
    with torch.no_grad(), torch.device("cpu"):  # models are built on meta
        x = torch.tensor([[900.0, -7.0, 0.5], [-0.01, 80.0, 3.0]])
        layer = cls(3, 2, device="meta")
        layer.weight = nn.Parameter(torch.tensor([[-2.0, 0.3, 50.0], [7.0, -0.1, 0.02]]))
        layer.bias = nn.Parameter(torch.tensor([0.5, -100.0]))
        try:
            y = layer(x)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
            return False  # it wants other inputs
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected)


def select_targets(
    model: nn.Module,
    targets: Sequence[str] | None,
    modules_to_not_convert: Sequence[str] | None,
    default_dense: Mapping[str, str],
) -> Selection:
    """Choose the layers to prune.

    Args:
        model: the model to look through.
        targets: regexes of what to prune; None for every linear layer.
        modules_to_not_convert: regexes left dense; None for `default_dense`.
        default_dense: names of modules that stay dense unless asked for, with the reason.

    Raises:
        TargetError: a regex matches nothing, selects a tied weight, or nothing is left to prune.
    """
    layers = {name: m for name, m in model.named_modules() if is_prunable(m)}
    names = list(layers)
    for pattern in (*(targets or ()), *(modules_to_not_convert or ())):
        require_match(pattern, names)
    ties = tied_parameters(model)
    chosen: list[Target] = []
    left_dense = _fused_experts(model, ties) | _convolutions(model)
    for name, module in layers.items():
        wanted = targets is not None and any(matches(p, name) for p in targets)
        reason = None
        if targets is not None and not wanted:
            reason = "no target matches it"
        elif modules_to_not_convert is not None:
            if any(matches(p, name) for p in modules_to_not_convert):
                reason = "in modules_to_not_convert"
        elif name in default_dense and not wanted:
            reason = default_dense[name]
        if reason is None and f"{name}.weight" in ties:
            reason = f"its weight is tied to {ties[f'{name}.weight'].removesuffix('.weight')}"
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
    return Selection(tuple(chosen), left_dense)


def find_routers(model: nn.Module) -> dict[str, str]:
    """Layers that send tokens to experts, with the reason to leave them dense.

    A router is a layer below a module whose class says so, or one that stands beside a module
    `experts` and gives a score for each of them, or one gate for all.
    """
    found: dict[str, str] = {}
    for parent_name, parent in model.named_modules():
        prefix = f"{parent_name}." if parent_name else ""
        if ROUTER_CLASS.search(type(parent).__name__):
            for name, module in parent.named_modules():
                if is_prunable(module):
                    found[(prefix + name).rstrip(".")] = f"it is part of the router {parent_name}"
        experts = getattr(parent, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        scores = {1, *(len(p) for p in experts.parameters() if p.ndim == 3)}
        scores |= {len(m) for m in experts.modules() if isinstance(m, nn.ModuleList)}
        for name, module in parent.named_children():
            if is_prunable(module) and Target(name, module).shape[0] in scores:
                found[prefix + name] = f"it routes tokens to {prefix}experts"
    return found


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


def _convolutions(model: nn.Module) -> dict[str, str]:
    """Convolutions that are no linear layers, with the reason."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and not isinstance(module, SparseLinear):
            reason = _why_not_pointwise(module)
            if reason is not None:
                found[name] = f"{reason}, no linear layer"
    return found


def require_match(pattern: str, names: Iterable[str]) -> None:
    """Raise a TargetError with near names if a pattern matches no layer."""
    names = list(names)
    if any(matches(pattern, name) for name in names):
        return
    hint = near_names(pattern, names, "layers")
    raise TargetError(
        f"{pattern!r} matches no linear layer; {hint}. A regex must match whole components of a "
        "name"
    )


def layer_sparsity(sparsities: Mapping[str, float], name: str) -> float | None:
    """The sparsity of the first regex that matches a layer's name; None if none does."""
    return next((s for pattern, s in sparsities.items() if matches(pattern, name)), None)
