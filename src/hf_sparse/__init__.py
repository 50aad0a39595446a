"""hf_sparse: one-shot pruning and sparse layers for Hugging Face Transformers.

Importing the package registers the quantisation method `hf_sparse` with transformers.
"""

from importlib.metadata import version as _version

from .calibration.data import DataRecord
from .config import SparseConfig
from .errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    FormatError,
    HfSparseError,
    SaveError,
    SolveError,
    TargetError,
)
from .explain import Explanation, explain
from .layers import SparseLinear
from .quantizer import SparseQuantizer, prune
from .report import LayerReport, PruningReport
from .saving import export_dense

__version__ = _version("hf_sparse")

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "DataRecord",
    "Explanation",
    "FormatError",
    "HfSparseError",
    "LayerReport",
    "PruningReport",
    "SaveError",
    "SolveError",
    "SparseConfig",
    "SparseLinear",
    "SparseQuantizer",
    "TargetError",
    "explain",
    "export_dense",
    "prune",
]
