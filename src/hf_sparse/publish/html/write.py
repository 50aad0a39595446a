"""A report as one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from torch import nn

from ...checkpoint.folder import write_file
from ...core.errors import EvaluationError
from ...core.untrusted_text import brief, printable
from ...evaluation import Evaluation, ExplanationDrift
from ...pruning.report import PruningReport
from ..counted import counted
from .masks import CORNER, GRID, LAYERS, MaskView, read_masks
from .page import page_values

ASSETS = files(__package__) / "assets"


def write_report(
    report: PruningReport,
    path: str | os.PathLike[str],
    *,
    masks: nn.Module | str | os.PathLike[str] | None = None,
    evaluation: Evaluation | None = None,
    drift: ExplanationDrift | None = None,
) -> None:
    """Write a report as one HTML file: it has its styles and scripts inside, and fetches nothing.

    Args:
        report: from `prune`, `model.hf_quantizer.report` or `PruningReport.from_folder`.
        path: the file; appears complete or not at all.
        masks: the pruned model, or the folder of its checkpoint, to show masks of its layers: how
            dense each of 48 x 48 parts is and the first 128 x 128 weights, of at most 256 layers.
            The zeros of a folder's layers are counted anew.
        evaluation: from `evaluate`, to show beside it.
        drift: from `explanation_drift`, likewise.

    Raises:
        EvaluationError: there is no report.
        CheckpointError: the folder's files are damaged.
        SaveError: the file can't be written; what was there before is as it was.
    """
    if not isinstance(report, PruningReport):
        raise EvaluationError(
            f"report={brief(report)} is no report: pass what prune returned or what "
            "PruningReport.from_folder finds; a model may have been loaded without one"
        )
    if masks is not None and not isinstance(masks, nn.Module):
        report = counted(report, Path(masks))
    names = [layer.name for layer in report.layers]
    views = [] if masks is None else read_masks(masks, names)
    write_file(path, render(report, views, evaluation, drift))


def render(
    report: PruningReport,
    masks: list[MaskView],
    evaluation: Evaluation | None = None,
    drift: ExplanationDrift | None = None,
) -> str:
    """The page. Whatever comes from a checkpoint or a model is escaped by the template."""
    style, script, template = (_asset(name) for name in ("page.css", "page.js", "page.html"))
    values = page_values(report, masks, evaluation, drift)
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_visible)
    page = environment.from_string(template)
    return page.render(
        **values,
        masks_json=_json(values["masks"]),
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        grid=GRID,
        corner=CORNER,
        most_masks=LAYERS,
    )


def _visible(value: Any) -> Any:
    """A string without characters that turn the text around, or that no file can hold."""
    return printable(value, keep="\n") if type(value) is str else value


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing is fetched, and nothing runs but the page's own style and script."""
    return (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(value: Any) -> Markup:
    """JSON that can stand inside a script element: no character there that HTML reads."""
    text = json.dumps(value, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)
