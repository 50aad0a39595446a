"""What was measured, for the model-index and for the card's table."""

from __future__ import annotations

from huggingface_hub import EvalResult

from ..report import PruningReport


def eval_results(report: PruningReport) -> list[EvalResult]:
    """For the model-index: what was measured of the sparse model on data."""
    return []


def result_rows(report: PruningReport) -> list[tuple[str, str, str, str]]:
    """Measure, dense, sparse, what it was measured on."""
    return []
