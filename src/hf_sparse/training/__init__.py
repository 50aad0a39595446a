"""Training of sparse models in full: kept values as parameters, patterns watched, distillation.

Not imported by `hf_sparse` itself: transformers' Trainer takes seconds to import.
"""

from .callback import SparsityCallback
from .kept_values import finish_training, prepare_for_training
from .trainer import SparseTrainer

__all__ = ["SparseTrainer", "SparsityCallback", "finish_training", "prepare_for_training"]
