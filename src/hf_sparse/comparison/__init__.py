"""Several methods at several sparsities on one model: figures side by side."""

from .result import Comparison, Point
from .run import compare

__all__ = ["Comparison", "Point", "compare"]
