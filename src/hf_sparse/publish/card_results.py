"""What was measured of a model, in the form of the Hub's model-index."""

from __future__ import annotations

import math

from huggingface_hub import EvalResult

from ..calibration.sources import HUB_NAMES
from ..core.data_record import DataRecord
from ..evaluation import Evaluation

TASK = "text-generation"  # all that is measured is of causal language models


def eval_results(evaluation: Evaluation) -> list[EvalResult]:
    """The results of the sparse model on data; without those that aren't finite."""
    found = []
    if (measured := evaluation.perplexity) is not None:
        found.append(_result(measured.data, "perplexity", "Perplexity", measured.perplexity))
    if (agreed := evaluation.agreement) is not None:
        nats, same = "KL divergence from the dense model, nats", "Dense model's most probable token"
        found.append(_result(agreed.data, "kl_divergence", nats, agreed.kl_divergence))
        found.append(_result(agreed.data, "top1_agreement", same, agreed.top1))
    return [result for result in found if math.isfinite(result.metric_value)]


def _result(data: DataRecord, kind: str, name: str, value: float) -> EvalResult:
    repository, _, configuration = data.source.partition(":")
    repository, configuration = HUB_NAMES.get(data.source, (repository, configuration))
    return EvalResult(
        task_type=TASK,
        dataset_type=repository,
        dataset_name=data.source,
        dataset_config=configuration or None,
        dataset_args={"tokens": data.tokens, "sha256": data.digest},
        metric_type=kind,
        metric_name=name,
        metric_value=value,
    )
