"""What a model is worth: perplexity, agreement with a dense model, speed, tasks."""

from .agreement import Agreement, agreement
from .generation import GenerationSpeed, generation_speed
from .perplexity import Perplexity, perplexity
from .sides import Evaluation, evaluate
from .tasks import TaskResults, evaluate_tasks
from .texts import Texts

__all__ = [
    "Agreement",
    "Evaluation",
    "GenerationSpeed",
    "Perplexity",
    "TaskResults",
    "Texts",
    "agreement",
    "evaluate",
    "evaluate_tasks",
    "generation_speed",
    "perplexity",
]
