"""Adapters that PEFT has put into a model: they are left alone, the layers below them are not."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ..core.errors import ConfigError


def find_adapters(model: nn.Module) -> dict[str, str]:
    """Modules that belong to adapters, with the reason to leave them dense.

    What an adapter wraps, its `base_layer`, isn't among them.

    Raises:
        ConfigError: an adapter is merged into its layer, whose own weight is gone for now.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None:  # then nobody has made any
        return {}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            if module.merged:
                raise ConfigError(
                    f"layer {name} has an adapter merged into it ({type(module).__name__}): call "
                    "unmerge_adapter() of the model first, or merge_and_unload()"
                )
            inside = (
                n for n, _ in module.named_modules(prefix=name) if not _below(n, name, "base_layer")
            )
            found |= dict.fromkeys(inside, f"it belongs to the adapter of {name}")
        elif isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper):
            inside = (n for n, _ in module.named_modules(prefix=name))
            found |= dict.fromkeys(inside, f"PEFT trains a copy of {name}")
    return found


def _below(name: str, parent: str, child: str) -> bool:
    return f"{name}.".startswith(f"{parent}.{child}.")
