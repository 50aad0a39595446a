"""Which parameters are tied: one in several modules, or several on one memory. They stay dense."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """The names of the parameters that modules share, each with that of another such parameter.

    A module that has several names itself is still one module: its parameters aren't tied.
    """
    names: dict[Hashable, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            names.setdefault(_memory(parameter), []).append(name)
    shared = [group for group in names.values() if len(group) > 1]
    return {name: group[name == group[0]] for group in shared for name in group}


def _memory(parameter: nn.Parameter) -> Hashable:
    """The same for parameters that a write to one of them changes together."""
    if parameter.is_meta or type(parameter) is not nn.Parameter or not parameter.numel():
        return id(parameter)
    storage = parameter.untyped_storage().data_ptr()
    return storage, parameter.storage_offset(), parameter.shape, parameter.dtype
