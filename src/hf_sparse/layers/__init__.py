"""Modules that hold packed weights."""

from .experts import SparseExperts
from .linear import SparseLinear

__all__ = ["SparseExperts", "SparseLinear"]
