"""What a model is worth: perplexity, agreement with a dense model, speed, tasks."""

from .agreement import Agreement, agreement
from .generation import GenerationSpeed, generation_speed
from .perplexity import Perplexity, perplexity
from .tasks import TaskResults, evaluate_tasks

__all__ = [
    "Agreement",
    "GenerationSpeed",
    "Perplexity",
    "TaskResults",
    "agreement",
    "evaluate_tasks",
    "generation_speed",
    "perplexity",
]
