"""hf_sparse: one-shot pruning and sparse layers for Hugging Face Transformers.

Importing the package registers the quantisation method `hf_sparse` with transformers.
"""

from importlib.metadata import version as _version

from .adapters import export_low_rank, split_low_rank
from .calibration.data import DataRecord
from .comparison import Comparison, ComparisonPoint, compare
from .config import SparseConfig
from .conversion import Conversion, convert_checkpoint
from .environment import Environment
from .errors import (
    AdapterError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    EvaluationError,
    FormatError,
    HfSparseError,
    HubError,
    PackageError,
    SaveError,
    SolveError,
    TargetError,
    TrainingError,
)
from .evaluation import (
    Agreement,
    Evaluation,
    GenerationSpeed,
    Perplexity,
    TaskResults,
    Texts,
    agreement,
    evaluate,
    evaluate_tasks,
    generation_speed,
    perplexity,
)
from .explain import Explanation, explain
from .layers import SparseExperts, SparseLinear
from .merging import LayerMerge, MergeReport, merge_adapter
from .quantizer import SparseQuantizer, prune
from .report import LayerReport, PruningReport
from .reporting import write_report
from .saving import export_dense

__version__ = _version("hf_sparse")

__all__ = [
    "AdapterError",
    "Agreement",
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "ComparisonPoint",
    "ConfigError",
    "Conversion",
    "DataRecord",
    "Environment",
    "Evaluation",
    "EvaluationError",
    "Explanation",
    "FormatError",
    "GenerationSpeed",
    "HfSparseError",
    "HubError",
    "LayerMerge",
    "LayerReport",
    "MergeReport",
    "PackageError",
    "Perplexity",
    "PruningReport",
    "SaveError",
    "SolveError",
    "SparseConfig",
    "SparseExperts",
    "SparseLinear",
    "SparseQuantizer",
    "TargetError",
    "TaskResults",
    "Texts",
    "TrainingError",
    "agreement",
    "compare",
    "convert_checkpoint",
    "evaluate",
    "evaluate_tasks",
    "explain",
    "export_dense",
    "export_low_rank",
    "generation_speed",
    "merge_adapter",
    "perplexity",
    "prune",
    "split_low_rank",
    "write_report",
]
