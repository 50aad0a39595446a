"""What a model is worth: perplexity, agreement with a dense model, speed, tasks."""

from .agreement import Agreement, agreement
from .evaluate import Evaluation, evaluate
from .explanation_drift import ExplanationDrift, SampleDrift, explanation_drift
from .generation import GenerationSpeed, generation_speed
from .perplexity import Perplexity, perplexity
from .tasks import TaskResults, evaluate_tasks
from .texts import Texts

__all__ = [
    "Agreement",
    "Evaluation",
    "ExplanationDrift",
    "GenerationSpeed",
    "Perplexity",
    "SampleDrift",
    "TaskResults",
    "Texts",
    "agreement",
    "evaluate",
    "evaluate_tasks",
    "explanation_drift",
    "generation_speed",
    "perplexity",
]
