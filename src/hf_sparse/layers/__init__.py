"""Modules that hold packed weights."""

from .linear import SparseLinear

__all__ = ["SparseLinear"]
