"""Several methods at several sparsities on one model: figures side by side."""

from .point import ComparisonPoint
from .result import Comparison
from .run import compare

__all__ = ["Comparison", "ComparisonPoint", "compare"]
