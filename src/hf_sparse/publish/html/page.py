"""A report as the values that the page's template shows; no HTML here."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ...evaluation import Evaluation, ExplanationDrift
from ...pruning.expert_report import MixtureReport
from ...pruning.report import LayerReport, PruningReport
from .attention import attention_charts, attention_table
from .charts import Chart, line_chart
from .drift import drift_note, drift_table
from .masks import MaskView
from .tables import Cell, HeatMap, Table, heat_map, number, text, without_empty_columns

ROWS = 1000  # of a table at most
MB = 1e6

_EXPERT = re.compile(r"(?:^|\.)experts\.(\d{1,9})\.")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def page_values(
    report: PruningReport,
    masks: Sequence[MaskView],
    evaluation: Evaluation | None,
    drift: ExplanationDrift | None = None,
) -> dict[str, Any]:
    """Everything that page.html asks for."""
    measured = evaluation or Evaluation()
    return {
        "name": report.model or "model",
        "summary": report.summary(),
        "advice": report.advice(),
        "tiles": _tiles(report, measured),
        "made": _made(report),
        "config": [(text(k), text(json.dumps(v))) for k, v in report.config.items()],
        "measures": _measures(measured),
        "measured_on": _measured_on(measured),
        "drift": drift_table(drift),
        "drift_note": drift_note(drift),
        "texts": measured.texts,
        "heat_maps": _heat_maps(report.layers),
        "charts": _charts(report.layers, measured),
        "sizes": _sizes(report),
        "attention": attention_table(measured.attention, ROWS),
        "masks": [view.to_dict() for view in masks],
        "mask_names": [view.name for view in masks],
        "experts": _experts(report.experts),
        "layers": _layers(report.layers),
        "blocks": _blocks(report),
        "left_dense": _left_dense(report.left_dense),
        "reasons": Counter(report.left_dense.values()).most_common(),
    }


def _tiles(report: PruningReport, measured: Evaluation) -> list[tuple[str, str, str]]:
    """What one wants to know first: label, value, and what it is compared with."""
    tiles = [("sparsity", f"{report.sparsity:.2%}", f"of {len(report.layers)} layers")]
    for label, form, share in _sizes(report)[1:]:
        where = label.removeprefix("sparse, ")
        tiles.append((where, form, f"{share:.3f} of the dense weights' bytes"))
    if measured.perplexity:
        before = measured.dense_perplexity
        dense = f"dense {before.perplexity:.3f}" if before else "dense not measured"
        tiles.append(("perplexity", f"{measured.perplexity.perplexity:.3f}", dense))
    errors = [x.relative_error for x in report.layers if x.relative_error is not None]
    if errors:
        tiles.append(("relative error", f"{fmean(errors):.3f}", "of a layer's outputs, mean"))
    if measured.speed:
        timed = measured.dense_speed
        dense = f"dense {timed.tokens_per_second:.1f}" if timed else "dense not measured"
        tiles.append(("tokens a second", f"{measured.speed.tokens_per_second:.1f}", dense))
    return [*tiles, ("time to prune", _duration(report.seconds), "data loading included")]


def _made(report: PruningReport) -> list[tuple[str, str]]:
    """How it was made: term and description."""
    config, data, where = report.config, report.data, report.environment
    terms = {
        "Model": report.model,
        "Method": config.get("method"),
        "Sparsity asked for": config.get("sparsity"),
        "Pattern": config.get("pattern"),
        "Seed": config.get("seed"),
        "Calibration data": data.source if data else "none",
    }
    if data:
        terms["Samples"] = f"{data.count:,}" if data.count is not None else None
        terms["Tokens"] = f"{data.tokens:,}" if data.tokens is not None else None
        terms["SHA-256 of the inputs"] = data.digest
    if where:
        terms["Device"] = where.device
        terms["Processor"] = f"{where.processor}, {where.cores} cores, {where.threads} threads"
        terms["Instruction set"] = where.instruction_set
        terms["System"] = where.system
        terms["Versions"] = ", ".join(f"{name} {v}" for name, v in where.versions.items())
    terms |= {"Time": _duration(report.seconds), "Date": _date(report.date)}
    return [(term, str(value)) for term, value in terms.items() if value not in (None, "")]


def _date(stamp: str) -> str:
    return stamp.replace("T", " ").replace("+00:00", " UTC")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{seconds:.1f} s" if seconds < 120 else f"{minutes // 60} h {minutes % 60} min {rest} s"


def _measures(measured: Evaluation) -> Table | None:
    """Dense and sparse side by side."""
    rows: list[tuple[str, float | None, float | None, str, float]] = []
    sparse, dense = measured.perplexity, measured.dense_perplexity
    if sparse:
        before = dense.perplexity if dense else None
        rows.append(("perplexity", before, sparse.perplexity, ".3f", 1))
    if measured.agreement:
        rows.append(("KL divergence, nats", None, measured.agreement.kl_divergence, ".4f", 1))
        rows.append(("same most probable token", None, measured.agreement.top1, ".2%", 1))
    fast, slow = measured.speed, measured.dense_speed
    if fast:
        for label, name, spec, unit in (
            ("tokens a second", "tokens_per_second", ".1f", 1),
            (f"seconds for a prompt of {fast.prompt_tokens}", "prefill_seconds", ".4f", 1),
            ("all weights in memory, MB", "weight_bytes", ",.1f", MB),
            ("peak memory, MB", "peak_bytes", ",.1f", MB),
        ):
            before = getattr(slow, name) if slow else None
            rows.append((label, before, getattr(fast, name), spec, unit))
    if not rows:
        return None
    cells = [
        (
            text(label),
            number(before, spec, unit),
            number(after, spec, unit),
            number(after / before if before and after is not None else None, ".3f"),
        )
        for label, before, after, spec, unit in rows
    ]
    headings = ("", "dense", "sparse", "sparse / dense")
    return without_empty_columns(Table("measures", "Measured", headings, cells))


def _measured_on(measured: Evaluation) -> list[str]:
    found = []
    if p := measured.perplexity:
        how = "blocks" if p.stride is None else f"windows, {p.stride} tokens apart,"
        found.append(
            f"Perplexity over {p.tokens:,} tokens of {p.data.source}, in {p.windows:,} {how} of "
            f"{p.seq_len:,} (SHA-256 of the inputs: {p.data.digest})."
        )
    if s := measured.speed:
        found.append(f"Greedy generation of {s.new_tokens} tokens on {s.machine}.")
    return found


def _column(layer: LayerReport) -> str:
    """A layer's place in its block; experts share one."""
    local = layer.name.removeprefix(layer.block).lstrip(".")
    return _NUMBER.sub("*", local or layer.name.rpartition(".")[2])


def _heat_maps(layers: Sequence[LayerReport]) -> list[HeatMap]:
    sparsity: dict[tuple[str, str], list[float]] = {}
    errors: dict[tuple[str, str], list[float]] = {}
    tokens: dict[tuple[str, str], list[float]] = {}
    for layer in layers:
        place = layer.block or layer.name, _column(layer)
        sparsity.setdefault(place, []).append(layer.sparsity)
        if layer.relative_error is not None:
            errors.setdefault(place, []).append(layer.relative_error)
        expert = _EXPERT.search(layer.name)
        if expert and layer.tokens is not None:
            tokens.setdefault((place[0], expert[1]), []).append(layer.tokens)
    order = {row: i for i, row in enumerate(dict.fromkeys(row for row, _ in tokens))}
    by_number = sorted(tokens, key=lambda place: (order[place[0]], int(place[1])))
    ordered = {place: tokens[place] for place in by_number}
    maps = (
        heat_map("sparsity-map", "Sparsity", sparsity, "{:.3f}".format),
        heat_map("error-map", "Relative error of a layer's outputs", errors, "{:.3f}".format),
        heat_map("expert-map", "Calibration tokens of each expert", ordered, "{:,.0f}".format),
    )
    return [found for found in maps if found]


def _charts(layers: Sequence[LayerReport], measured: Evaluation) -> list[Chart]:
    errors: dict[str, list[float]] = {}
    for layer in layers:
        if layer.relative_error is not None:
            errors.setdefault(layer.block or layer.name, []).append(layer.relative_error)
    charts = []
    if errors:
        caption = "Relative error of the layers of each block, mean"
        means = [fmean(found) for found in errors.values()]
        charts.append(line_chart("error-chart", caption, "block", means, list(errors)))
    if measured.agreement and measured.agreement.depth:
        depth = measured.agreement.depth
        names = ["embeddings", *(f"after block {i}" for i in range(1, len(depth)))]
        caption = "Relative error of the hidden states, against the dense model"
        charts.append(line_chart("depth-chart", caption, "blocks passed", depth, names))
    charts += attention_charts(measured.attention)
    return charts


def _sizes(report: PruningReport) -> list[tuple[str, str, float]]:
    """Label, text and share of the dense bytes."""
    before = report.bytes_before or 1
    return [
        (label, f"{size / MB:,.2f} MB", size / before)
        for label, size in (
            ("dense", report.bytes_before),
            ("sparse, on disk", report.bytes_after),
            ("sparse, in memory", report.bytes_resident),
        )
    ]


def _experts(mixtures: Sequence[MixtureReport]) -> Table:
    rows: list[Sequence[Cell]] = []
    for mixture in mixtures:
        each = zip(mixture.scores, mixture.shares, strict=True)
        for index, (score, share) in list(enumerate(each))[: max(0, ROWS - len(rows))]:
            stays = "removed" if index in mixture.removed else "stays"
            figures = number(score, ".4g"), number(share, ".2%"), text(stays)
            rows.append((text(mixture.name), number(index), *figures))
    headings = ("mixture", "expert", "score", "of its tokens", "")
    left_out = sum(len(mixture.scores) for mixture in mixtures) - len(rows)
    return Table("experts", "Experts", headings, rows, left_out)


def _layers(layers: Sequence[LayerReport]) -> Table:
    headings = ["layer", "out", "in", "pattern", "sparsity", "relative error", "tokens", "seconds"]
    headings += ["format", "MB before", "MB on disk", "kernel", "notes"]
    kept = layers
    if len(layers) > ROWS:  # what needs attention
        worst = sorted(layers, key=lambda x: -(x.relative_error or 0))[:ROWS]
        names = {layer.name for layer in worst}
        kept = [layer for layer in layers if layer.name in names]
    rows = [
        (
            text(layer.name),
            number(layer.shape[0]),
            number(layer.shape[1]),
            text(layer.pattern),
            number(layer.sparsity, ".4f"),
            number(layer.relative_error, ".4f"),
            number(layer.tokens),
            number(layer.seconds, ".2f"),
            text(layer.format),
            number(layer.bytes_before, ",.2f", MB),
            number(layer.bytes_after, ",.2f", MB),
            text(layer.kernel),
            text("; ".join(layer.notes)),
        )
        for layer in kept
    ]
    left_out = len(layers) - len(kept)
    return without_empty_columns(Table("layers", "Pruned layers", headings, rows, left_out))


def _blocks(report: PruningReport) -> Table:
    grouped: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        grouped.setdefault(layer.block or layer.name, []).append(layer)
    rows: list[Sequence[Cell]] = []
    for name, layers in list(grouped.items())[:ROWS]:
        inside = PruningReport(tuple(layers))
        errors = [x.relative_error for x in layers if x.relative_error is not None]
        rows.append(
            (
                text(name),
                number(len(layers)),
                number(inside.sparsity, ".4f"),
                number(fmean(errors) if errors else None, ".4f"),
                number(report.block_seconds.get(name), ".2f"),
                number(inside.bytes_before, ",.2f", MB),
                number(inside.bytes_after, ",.2f", MB),
            )
        )
    headings = ("block", "layers", "sparsity", "mean error", "seconds", "MB before", "MB on disk")
    left_out = len(grouped) - len(rows)
    return without_empty_columns(Table("blocks", "Blocks", headings, rows, left_out))


def _left_dense(reasons: Mapping[str, str]) -> Table:
    shown = list(reasons.items())[:ROWS]
    rows = [(text(name), text(reason)) for name, reason in shown]
    return Table("left-dense", "Not pruned", ("layer", "why"), rows, len(reasons) - len(rows))
