"""Models that aren't held as pruning needs them: sharded, or made without gradients."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..core.errors import ConfigError


def check_not_sharded(model: nn.Module) -> None:
    """Raise a ConfigError if FSDP's first version has put weights into one vector for all.

    They are parts of it from then on, of this process, which no sparse layer can replace. Those of
    its second version are tensors of a type that tells.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # whoever wrapped it has imported it
    for name, module in model.named_modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise ConfigError(
                f"{name or 'the model'} is wrapped in FullyShardedDataParallel, its weights are "
                "spread over processes: prune the model first, then wrap it"
            )


def make_ordinary(model: nn.Module) -> None:
    """Tensors made within `torch.inference_mode` can't be written to or used for gradients outside:
    those of a model that was loaded there become ordinary ones, ties included."""
    known: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_inference():
                    continue
                if tensor not in known:
                    copy = tensor.detach().clone()
                    parameter = isinstance(tensor, nn.Parameter)
                    flag = tensor.requires_grad
                    known[tensor] = nn.Parameter(copy, flag) if parameter else copy
                held[name] = known[tensor]  # type: ignore[assignment]
