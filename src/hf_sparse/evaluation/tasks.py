"""Benchmarks of the package lm-eval on a model that is loaded; needs lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import EvaluationError
from .data import check_causal


@dataclass(frozen=True)
class TaskResults:
    """What lm-eval measured.

    Attributes:
        results: for each task its metrics, e.g. {"arc_easy": {"acc": 0.7, "acc_stderr": 0.01}}.
        versions: the tasks' versions, by name.
        samples: how many samples each task used.
        num_fewshot: examples in the prompt, by task.
        lm_eval: version of lm-eval.
    """

    results: Mapping[str, Mapping[str, float]]
    versions: Mapping[str, Any]
    samples: Mapping[str, int]
    num_fewshot: Mapping[str, int]
    lm_eval: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(
            f"{task}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
            for task, metrics in self.results.items()
        )


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> TaskResults:
    """Run tasks of lm-eval on a model, sparse or dense.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        tasks: names that lm-eval knows, or of YAML files in `include_path`. Such a file may name
            Python code that lm-eval then runs: use files that you trust.
        include_path: a folder with tasks of your own.
        num_fewshot: examples in the prompt; None for each task's own number.
        limit: samples a task at most. Default all.
        batch_size: sequences per forward pass.
        seed: for the choice of examples and for bootstrapped errors.

    Raises:
        EvaluationError: lm-eval isn't installed, a task isn't known, or the folder isn't there.
    """
    check_causal(model)
    if include_path is not None and not Path(include_path).is_dir():
        raise EvaluationError(f"include_path={str(include_path)!r} is no folder")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise EvaluationError(
            "tasks are run by lm-eval, which is not installed: pip install lm-eval"
        ) from None
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise EvaluationError(
            f"lm-eval has no task {', '.join(map(repr, unknown)) or 'given'}: "
            "`lm-eval ls tasks` lists them; your own need include_path"
        )
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        log_samples=False,
    )
    return TaskResults(
        results={task: _metrics(values) for task, values in found["results"].items()},
        versions=dict(found["versions"]),
        samples={task: counts["effective"] for task, counts in found["n-samples"].items()},
        num_fewshot=dict(found["n-shot"]),
        lm_eval=lm_eval.__version__,
    )


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """A task's numbers; lm-eval names them "metric,filter"."""
    numbers = {k: v for k, v in values.items() if isinstance(v, float) and "," in k}
    return {key.removesuffix(",none"): value for key, value in numbers.items()}
