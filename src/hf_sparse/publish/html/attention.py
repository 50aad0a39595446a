"""What was found out of a model's attention, as a table and as lines over its depth."""

from __future__ import annotations

from ...evaluation import AttentionDiagnosis
from .charts import Chart, line_chart
from .tables import Table, number, text


def attention_table(found: AttentionDiagnosis | None, most: int) -> Table | None:
    """A row for each head, `most` of them: shares of its mass, and the methods' errors."""
    if found is None or not found.heads:
        return None
    methods = list(found.heads[0].errors)
    caption = f"Attention: mass in {found.keys} keys and in rank {found.rank}, relative errors"
    rows = [
        (
            text(head.layer),
            number(head.head),
            *(number(share, ".3f") for share in (head.top, head.window, head.low_rank)),
            *(number(head.errors.get(method), ".3f") for method in methods),
        )
        for head in found.heads[:most]
    ]
    headings = ("layer", "head", "top keys", "window", "low rank", *methods)
    return Table("attention", caption, headings, rows, len(found.heads) - len(rows))


def attention_charts(found: AttentionDiagnosis | None) -> list[Chart]:
    """Each column's mean over the heads, layer by layer."""
    layers = found.layers if found is not None else {}
    columns = list(next(iter(layers.values()), {}))
    return [
        line_chart(
            f"attention-{name.replace(' ', '-')}",
            f"{'Error of' if name.startswith('hs_') else 'Attention in'} {name}, mean over heads",
            "attention layer",
            [row[name] for row in layers.values()],
            list(layers),
        )
        for name in columns
    ]
