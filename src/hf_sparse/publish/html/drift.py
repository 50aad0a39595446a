"""How a sparse model's explanations differ from the dense one's, as the page shows it."""

from __future__ import annotations

from ...evaluation import ExplanationDrift
from .tables import Table, number, text

ROWS = 200  # samples in the table at most


def drift_table(drift: ExplanationDrift | None) -> Table | None:
    """The samples whose attributions correlate least."""
    if drift is None:
        return None
    numbered = sorted(enumerate(drift.samples), key=lambda pair: pair[1].rank_correlation)
    rows = [
        (
            number(index),
            number(sample.tokens),
            number(sample.rank_correlation, ".3f"),
            number(sample.overlap, ".1%"),
            text("yes" if sample.same_prediction else "no"),
        )
        for index, sample in numbered[:ROWS]
    ]
    top = f"top {drift.top} in common"
    headings = ("sample", "tokens", "rank correlation", top, "same prediction")
    caption = "Attributions of both models"
    return Table("drift", caption, headings, rows, len(numbered) - len(rows))


def drift_note(drift: ExplanationDrift | None) -> str:
    """The means, in a line."""
    return "" if drift is None else str(drift).split("\n", 1)[0]
