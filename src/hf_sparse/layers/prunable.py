"""Which modules are linear layers that can be pruned, and why others that multiply can't.

Linear are `nn.Linear`, transformers' `Conv1D`, and convolutions that are pointwise: linear over the
channels of each position. They have a weight of their own, and a bias or none, and nothing else: a
weight that is made of other parameters at every call (weight norm, parametrizations, masks of
`torch.nn.utils.prune`) would be dense again with the next one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from .linear import SparseLinear

# What multiplies by weights of its own, and calls no linear layer for it.
OTHERS = (nn.MultiheadAttention, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)
# Buffers and parameters of torch's own hooks that make a weight anew, and what ends that.
REMADE = {
    "weight_mask": "masked by torch.nn.utils.prune: call torch.nn.utils.prune.remove(layer, {0!r})",
    "weight_g": "made by weight_norm: call torch.nn.utils.remove_weight_norm(layer, {0!r})",
    "weight_u": "made by spectral_norm: call torch.nn.utils.remove_spectral_norm(layer, {0!r})",
}


def multiplies(module: nn.Module) -> bool:
    """Does a dense module multiply its inputs by weights of its own?"""
    if isinstance(module, SparseLinear):
        return False
    return isinstance(module, (nn.Linear, _ConvNd, *OTHERS)) or _is_transformers_conv1d(module)


def is_prunable(module: nn.Module) -> bool:
    """A dense linear layer, with a weight that is a parameter of its own?"""
    return multiplies(module) and why_not_prunable(module) is None


def why_not_prunable(module: nn.Module) -> str | None:
    """What keeps a module that multiplies from being pruned; None if nothing does."""
    if isinstance(module, OTHERS):
        return f"{type(module).__name__} multiplies by its weights itself, it calls no linear layer"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight and never calls it"
    if isinstance(module, _ConvNd):
        reason = _why_not_pointwise(module)
        if reason is not None:
            return f"{reason}, no linear layer"
    reason = _why_remade(module)
    if reason is None and isinstance(module, nn.Linear) and not _computes_linear(type(module)):  # type: ignore[arg-type]
        reason = f"{type(module).__name__} computes in a way of its own"
    reason = reason or _why_more_than_linear(module)
    if reason is None and "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        reason = "its forward was replaced by another function"
    return reason


def _is_transformers_conv1d(module: nn.Module) -> bool:
    """Told by its two sizes, nx -> nf: remote code has copies of the class."""
    weight = getattr(module, "weight", None)
    sizes = getattr(module, "nx", None), getattr(module, "nf", None)
    return isinstance(weight, Tensor) and tuple(weight.shape) == sizes


def _why_remade(module: nn.Module) -> str | None:
    """What a layer's weight or bias is made of at every call, as torch's own tools do."""
    if parametrize.is_parametrized(module):
        names = list(module.parametrizations)  # type: ignore[arg-type]
        return (
            f"its {' and '.join(names)} is made by torch.nn.utils.parametrize: call "
            f"parametrize.remove_parametrizations(layer, {names[0]!r}) first to prune it"
        )
    held = _held(module)
    for sign, text in REMADE.items():
        for name in ("weight", "bias"):
            if sign.replace("weight", name) in held:
                return f"its {name} is {text.format(name)} first to prune it"
    return None


def _why_more_than_linear(module: nn.Module) -> str | None:
    """What a layer holds that a sparse one would lose, or lacks that it needs."""
    extra = [name for name in _held(module) if name not in ("weight", "bias")]
    if extra or not isinstance(module._parameters.get("weight"), nn.Parameter):
        held = ", ".join(extra) or "no parameter `weight`"
        return f"besides a weight and a bias it holds {held}, which a sparse layer would lose"
    if isinstance(module.weight, UninitializedParameter):
        return "its weight isn't initialised: run the model once first"
    return None if module.weight.numel() else "its weight is empty"  # type: ignore[operator,union-attr]


def _held(module: nn.Module) -> list[str]:
    return [*module._parameters, *module._buffers, *module._modules]


def _why_not_pointwise(module: nn.Module) -> str | None:
    """What keeps a convolution from being linear over its channels; None if nothing does."""
    known = next((c for c in (nn.Conv1d, nn.Conv2d) if isinstance(module, c)), None)
    if known is None:
        return type(module).__name__
    if any(size != 1 for size in module.kernel_size):  # type: ignore[union-attr]
        return f"a convolution of kernel size {'x'.join(map(str, module.kernel_size))}"  # type: ignore[arg-type]
    if any(step != 1 for step in module.stride):  # type: ignore[union-attr]
        return f"a convolution of stride {'x'.join(map(str, module.stride))}"  # type: ignore[arg-type]
    if module.groups != 1:
        return f"a convolution of {module.groups} groups"
    if not isinstance(module.padding, str) and any(module.padding):  # type: ignore[arg-type]
        return "a convolution that pads its inputs"
    if parametrize.is_parametrized(module):
        return None  # its class is made up; the weight's reason counts
    cls: Any = type(module)
    own = cls.forward is not known.forward or cls._conv_forward is not known._conv_forward
    return f"{type(module).__name__} computes in a way of its own" if own else None


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
