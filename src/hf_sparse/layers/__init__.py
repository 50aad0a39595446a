"""Modules that hold packed weights."""

from .experts import SparseExperts
from .linear import SparseLinear, sparse_layers

__all__ = ["SparseExperts", "SparseLinear", "sparse_layers"]
