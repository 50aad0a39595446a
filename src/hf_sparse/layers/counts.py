"""Numbers of parameters as of dense models: a sparse layer counts as the weight that it stands for.

Kept values are buffers in the kernels' layouts, which nothing that counts `nn.Parameter`s sees.
How many are kept is in the pruning report.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from . import sparse_layers


def uncounted(model: nn.Module) -> int:
    """Entries of the sparse layers' dense weights that are in none of the model's parameters."""
    total = 0
    for layer in sparse_layers(model).values():
        own = layer.named_parameters(recurse=False)
        total += math.prod(layer.shape) - sum(p.numel() for name, p in own if name != "bias")
    return total


def num_parameters(
    model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """transformers' `num_parameters`, for a sparse model: the dense number.

    Args:
        model: with sparse layers.
        only_trainable: of the parameters that are trained, of kept values those alone.
        exclude_embeddings: without the embeddings.
    """
    counted: Any = type(model).num_parameters
    number: int = counted(model, only_trainable, exclude_embeddings)
    return number if only_trainable else number + uncounted(model)
