"""What a model is worth: perplexity, agreement with a dense model, speed, tasks."""

from .agreement import Agreement, agreement
from .attention import AttentionDiagnosis, diagnose_attention
from .evaluate import Evaluation, evaluate
from .explanation_drift import ExplanationDrift, SampleDrift, explanation_drift
from .generation import GenerationSpeed, generation_speed
from .perplexity import Perplexity, perplexity
from .tasks import TaskResults, evaluate_tasks
from .texts import Texts

__all__ = [
    "Agreement",
    "AttentionDiagnosis",
    "Evaluation",
    "ExplanationDrift",
    "GenerationSpeed",
    "Perplexity",
    "SampleDrift",
    "TaskResults",
    "Texts",
    "agreement",
    "diagnose_attention",
    "evaluate",
    "evaluate_tasks",
    "explanation_drift",
    "generation_speed",
    "perplexity",
]
