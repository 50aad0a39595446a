"""Mixtures of experts as wholes: which experts a module has, and how all but some are let go.

Two kinds can be taken apart: experts that are fused into 3-D parameters as `experts` describes,
once they are a `SparseExperts`, and a list or dict of modules with "expert" in its name. Experts
that all tokens go to stay out of it: they are called shared, or are no list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .blocks import is_container
from .experts import SparseExperts


@dataclass(frozen=True)
class Mixture:
    """The experts among which a router chooses.

    Attributes:
        name: of the module that holds them.
        container: that module.
        caller_name: of the module whose output is the sum of theirs, each times its gate.
        caller: that module.
        home: what the names begin with of all that stands beside the container, and so the
            router's.
    """

    name: str
    container: nn.Module
    caller_name: str
    caller: nn.Module
    home: str

    @property
    def experts(self) -> tuple[nn.Module, ...]:
        """In the order of the router's scores."""
        if isinstance(self.container, SparseExperts):
            return tuple(map(self.container.expert, range(self.container.num_experts)))
        return tuple(self.container.children())

    def keep(self, kept: Sequence[int]) -> None:
        """Let all experts go but some, which are numbered anew in the order given."""
        if isinstance(self.container, SparseExperts):
            self.container.keep(kept)
            return
        experts, names = self.experts, list(self.container._modules)
        self.container._modules.clear()
        for name, index in zip(names, kept, strict=False):
            self.container.add_module(name, experts[index])


def find_mixtures(model: nn.Module) -> dict[str, Mixture]:
    """The mixtures of a model that can be taken apart, by the names of their containers."""
    modules = dict(model.named_modules())
    found: dict[str, Mixture] = {}
    for name, module in modules.items():
        parent, _, local = name.rpartition(".")
        home = name.removesuffix(local)
        if isinstance(module, SparseExperts) and module.num_experts > 1:
            found[name] = Mixture(name, module, name, module, home)
        elif _is_list_of_experts(local, module):
            caller = parent if is_container(module) else name
            found[name] = Mixture(name, module, caller, modules[caller], home)
    return found


def _is_list_of_experts(local: str, module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    kinds = {type(child) for child in module.children()}
    named = "expert" in local.lower() and "shared" not in local.lower()
    return named and len(module) > 1 and len(kinds) == 1
