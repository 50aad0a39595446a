"""Which parameters are tied: one parameter in several modules. Tied weights stay dense."""

from __future__ import annotations

from torch import nn


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """The names of the parameters that modules share, each with that of another such parameter.

    A module that has several names itself is still one module: its parameters aren't tied.
    """
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            names.setdefault(id(parameter), []).append(name)
    shared = [group for group in names.values() if len(group) > 1]
    return {name: group[name == group[0]] for group in shared for name in group}
