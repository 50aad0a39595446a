"""Putting sparse layers where dense ones were, and back, hooks of accelerate included.

A module that accelerate has offloaded holds meta tensors; its hook knows where the data are. Its
successor is offloaded the same way: its (packed) tensors are in CPU memory, or on disk in a file.
"""

from __future__ import annotations

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..core.input_threshold import InputThreshold
from ..core.low_rank import LowRank
from ..formats import Format, Held
from .axes import Axes
from .conv import sparse_class
from .linear import SparseLinear
from .tensor_file import held_alike


def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Overwrite a layer's weight, given in the module's own orientation.

    An offloaded layer is brought in until it is replaced, or `offload_again` is called.
    """
    hook = getattr(module, "_hf_hook", None)
    if isinstance(hook, AlignDevicesHook) and hook.offload:
        with align_module_device(module):
            own = module.named_parameters(recurse=False)
            tensors = {name: parameter.detach().clone() for name, parameter in own}
        remove_hook_from_module(module)
        for name, tensor in tensors.items():
            requires_grad = getattr(module, name).requires_grad
            setattr(module, name, nn.Parameter(tensor, requires_grad=requires_grad))
        module._offloaded_by = hook  # type: ignore[assignment]
    held: nn.Parameter = module.weight  # type: ignore[assignment]
    with torch.no_grad():
        if held.untyped_storage().resizable():
            held.copy_(weight)
        else:
            # A file that is mapped: what is written there stays in memory with the whole file's
            # last tensor.
            held.data = weight.contiguous()


def offload_again(module: nn.Module) -> None:
    """Offload a layer that `write_weight` has brought in, and that isn't replaced."""
    hook = vars(module).pop("_offloaded_by", None)
    if hook is not None:
        _hook_like(hook, module)


def give_up_weight(module: nn.Module) -> None:
    """Leave a layer without its weight's contents: it has been replaced, but others hold it."""
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    module.weight = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)


def pack_linear(
    module: nn.Module,
    held: Held,
    fmt: Format,
    low_rank: LowRank | None = None,
    threshold: InputThreshold | None = None,
) -> SparseLinear:
    """A `SparseLinear` to replace a dense layer by: with the same weight, not resolved yet.

    Args:
        module: the dense layer.
        held: its weight, (out, in), or the weight's codes if it lies on a grid; the sparse part if
            there is a low-rank one.
        fmt: what `choose_format` chose for it.
        low_rank: to hold beside it, in the weight's dtype.
        threshold: up to where its inputs are to count as 0.
    """
    axes = Axes.of(module)
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
    rows, columns = axes.matrix(weight).shape
    return sparse_class(axes)(
        fmt, fmt.pack(held), (rows, columns), weight.dtype, bias, axes, low_rank, threshold
    )


def unpack_linear(sparse: SparseLinear, original: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Fill `original`, a dense layer on meta, with a sparse layer's weight and bias."""
    with torch.no_grad(), align_module_device(sparse):
        weight = sparse.axes.own(sparse.matrix.to(dtype))
        original.weight = nn.Parameter(weight.contiguous())
        original.bias = sparse.bias
    return original


# What `nn.Module` keeps of hooks that users have registered; the dicts themselves go along, so that
# a handle still removes its hook.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class ModuleParents:
    """Where a model has its modules, to put others there; it is looked through once for all."""

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self._found.setdefault(child, []).append((parent, name))

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` wherever the model has `old`."""
        parents = self._found.pop(old, [])
        for parent, name in parents:
            setattr(parent, name, new)
        self._found[new] = parents

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """`put`, and mode and hooks go with it."""
        self.put(old, new)
        inherit(old, new)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """`ModuleParents.replace` for one module."""
    ModuleParents(model).replace(old, new)


def inherit(old: nn.Module, new: nn.Module) -> None:
    """Give a module its predecessor's mode and hooks, the user's and accelerate's."""
    new.train(old.training)
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    new._is_full_backward_hook = old._is_full_backward_hook
    hook = getattr(old, "_offloaded_by", None) or getattr(old, "_hf_hook", None)
    if isinstance(hook, AlignDevicesHook):
        _hook_like(hook, new)


def _hook_like(hook: AlignDevicesHook, module: nn.Module) -> None:
    """Give a module with contents a hook that puts them where another module has its own."""
    tensors = None
    if hook.offload:
        own = {name: tensor.to("cpu") for name, tensor in module.state_dict().items()}
        tensors = held_alike(own, hook.weights_map)
    add_hook_to_module(
        module,
        AlignDevicesHook(
            execution_device=hook.execution_device,
            offload=hook.offload,
            io_same_device=hook.io_same_device,
            weights_map=tensors,
            offload_buffers=hook.offload,
            place_submodules=hook.place_submodules,
            skip_keys=hook.skip_keys,
        ),
    )
