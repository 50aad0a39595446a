"""hf_sparse: one-shot pruning and sparse layers for Hugging Face Transformers.

Importing the package registers the quantisation method `hf_sparse` with transformers.
"""

from importlib.metadata import version as _version
from typing import Any as _Any

from .calibration.attention import use_attention
from .checkpoint.compressed_tensors import Conversion, convert
from .checkpoint.dense_export import export_dense
from .config.recipes import register_solver
from .config.sparse_config import SparseConfig
from .core import renamed as _renamed
from .core.attention_settings import AttentionSettings
from .core.data_record import DataRecord
from .core.errors import (
    AdapterError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    EvaluationError,
    FormatError,
    HfSparseError,
    HubError,
    PackageError,
    ProcessError,
    RegistrationError,
    SaveError,
    SolveError,
    TargetError,
    TrainingError,
)
from .evaluation import (
    Agreement,
    AttentionDiagnosis,
    Evaluation,
    ExplanationDrift,
    GenerationSpeed,
    Perplexity,
    SampleDrift,
    TaskResults,
    Texts,
    agreement,
    diagnose_attention,
    evaluate,
    evaluate_tasks,
    explanation_drift,
    generation_speed,
    perplexity,
)
from .evaluation.comparison import Comparison, ComparisonPoint, compare
from .formats import register_format
from .kernels import register_kernel
from .kernels.machine import Environment
from .layers import SparseExperts, SparseLinear
from .layers.explain import Explanation, explain
from .layers.head_preview import preview_head
from .pruning.report import LayerReport, PruningReport
from .publish.html import write_report
from .publish.streaming.estimate import Estimate, estimate
from .publish.streaming.ledger import clear_checkpoint
from .publish.streaming.rates import Rates
from .publish.streaming.run import prune_checkpoint
from .quantizer import SparseQuantizer, prefer, prune, round_activations
from .training.lora_export import export_low_rank, split_low_rank
from .training.merging import LayerMerge, MergeReport, merge_adapter

__version__ = _version("hf_sparse")

_RENAMED = {"convert_checkpoint": "convert"}


def __getattr__(name: str) -> _Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    _renamed.warn_renamed(f"hf_sparse.{name}", f"hf_sparse.{new}", stacklevel=3)
    return globals()[new]


__all__ = [
    "AdapterError",
    "Agreement",
    "AttentionDiagnosis",
    "AttentionSettings",
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "ComparisonPoint",
    "ConfigError",
    "Conversion",
    "DataRecord",
    "Environment",
    "Estimate",
    "Evaluation",
    "EvaluationError",
    "Explanation",
    "ExplanationDrift",
    "FormatError",
    "GenerationSpeed",
    "HfSparseError",
    "HubError",
    "LayerMerge",
    "LayerReport",
    "MergeReport",
    "PackageError",
    "Perplexity",
    "ProcessError",
    "PruningReport",
    "Rates",
    "RegistrationError",
    "SampleDrift",
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
    "clear_checkpoint",
    "compare",
    "convert",
    "diagnose_attention",
    "estimate",
    "evaluate",
    "evaluate_tasks",
    "explain",
    "explanation_drift",
    "export_dense",
    "export_low_rank",
    "generation_speed",
    "merge_adapter",
    "perplexity",
    "prefer",
    "preview_head",
    "prune",
    "prune_checkpoint",
    "register_format",
    "register_kernel",
    "register_solver",
    "round_activations",
    "split_low_rank",
    "use_attention",
    "write_report",
]
