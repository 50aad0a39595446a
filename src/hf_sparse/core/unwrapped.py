"""The model inside what wraps it: PEFT's, torch.compile's and data-parallel ones."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.optim.swa_utils import AveragedModel

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that is pruned when a wrapper is passed; its layers are replaced in place, so that
    the wrapper computes with them, too. Another module is returned as it is."""
    peft: Any = sys.modules.get("peft")
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, PARALLEL):
            model = model.module
        elif peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
            model = model.get_base_model() if hasattr(model, "get_base_model") else _mixed(model)
        else:
            return model


def _mixed(model: Any) -> nn.Module:
    base: nn.Module = model.base_model.model
    return base
