"""Training of sparse models: kept values as parameters, patterns watched, distillation, adapters.

`SparseTrainer` and `SparsityCallback` are imported when they are asked for: transformers' Trainer,
which they derive from, takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .explanation_loss import ExplanationLoss
from .kept_values import finish_training, prepare_for_training

if TYPE_CHECKING:
    from .callback import SparsityCallback
    from .trainer import SparseTrainer

__all__ = [
    "ExplanationLoss",
    "SparseTrainer",
    "SparsityCallback",
    "finish_training",
    "prepare_for_training",
]


def __getattr__(name: str) -> Any:
    if name == "SparseTrainer":
        from .trainer import SparseTrainer

        return SparseTrainer
    if name == "SparsityCallback":
        from .callback import SparsityCallback

        return SparsityCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
