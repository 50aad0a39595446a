"""What was measured of a model: for the model-index, and for the card's tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from huggingface_hub import EvalResult

from ..calibration.sources import HUB_NAMES
from ..core.data_record import DataRecord
from ..evaluation import Evaluation, GenerationSpeed, Perplexity

TASK = "text-generation"  # all that is measured is of causal language models
Row = tuple[str, str, str, str]  # measure, dense, sparse, how and on what


def eval_results(evaluation: Evaluation) -> list[EvalResult]:
    """What was measured of the sparse model on data, in the form of the model-index."""
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


def quality_rows(evaluation: Evaluation) -> Iterator[Row]:
    """Perplexity of both models, and how far they agree."""
    sparse, dense = evaluation.perplexity, evaluation.dense_perplexity
    if sparse is not None:
        before = f"{dense.perplexity:.3f}" if dense is not None else ""
        yield "perplexity", before, f"{sparse.perplexity:.3f}", _how(sparse)
    if (agreed := evaluation.agreement) is not None:
        where = f"{agreed.tokens} positions of `{agreed.data.source}`"
        yield "KL divergence from dense, nats", "", f"{agreed.kl_divergence:.4f}", where
        yield "same most probable token as dense", "", f"{agreed.top1:.2%}", where


def speed_rows(evaluation: Evaluation) -> Iterator[Row]:
    """Generation by both models, and the machine."""
    sparse, dense = evaluation.speed, evaluation.dense_speed
    if sparse is None:
        return
    measures: dict[str, Any] = {
        f"tokens/s, {sparse.new_tokens} tokens after the prompt": _decoded,
        f"seconds for a prompt of {sparse.prompt_tokens} tokens": _prompt,
        "weights in memory": _weights,
    }
    for name, value in measures.items():
        yield name, value(dense) if dense else "", value(sparse), sparse.machine


def _decoded(speed: GenerationSpeed) -> str:
    return f"{speed.tokens_per_second:.1f}"


def _prompt(speed: GenerationSpeed) -> str:
    return f"{speed.prefill_seconds:.3f}"


def _weights(speed: GenerationSpeed) -> str:
    return f"{speed.weight_bytes / 1e6:.2f} MB"


def _how(measured: Perplexity) -> str:
    kind = "blocks" if measured.stride is None else f"windows, stride {measured.stride},"
    return (
        f"{measured.tokens} tokens of `{measured.data.source}`, {measured.windows} {kind} of "
        f"{measured.seq_len}"
    )
