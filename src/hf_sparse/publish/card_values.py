"""What the card's template shows: values, every string of them escaped for Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from statistics import fmean
from typing import Any

from ..core.data_record import DataRecord
from ..core.untrusted_text import markdown_code, markdown_text, python_string
from ..evaluation import Evaluation
from ..pruning.expert_report import removed_experts
from ..pruning.report import PruningReport

# Of the config, what has rows of its own, or what says nothing about the model.
SHOWN = ("quant_method", "sparsity", "pattern", "method", "dataset", "tokenizer", "seed")


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        name: its title.
        address: what `from_pretrained` gets.
        base: Hub id of the dense model; None if that is on no Hub.
        base_name: Hub id or folder name of the dense model; "" if it has none.
        model_class: the class of transformers that loads it.
        has_tokenizer: is a tokenizer beside the weights?
        settings: `SparseConfig` as a dict.
        defaults: the same for a config that names only the method.
        data: how the calibration data were made; None if there were none.
        report: what pruning did; None if that is not known.
        evaluation: what was measured of the model.
        weight_bytes: of all weight files.
        plain: is it an ordinary checkpoint, that only lost experts?
    """

    name: str
    address: str
    base: str | None
    base_name: str
    model_class: str
    has_tokenizer: bool
    settings: Mapping[str, Any]
    defaults: Mapping[str, Any]
    data: DataRecord | None
    report: PruningReport | None
    evaluation: Evaluation
    weight_bytes: int
    plain: bool = False


class Shown(str):
    """A string as a line of Markdown shows it.

    Attributes:
        raw: the string itself.
        code: what shows it as code.
    """

    raw: str
    code: str

    def __new__(cls, raw: str) -> Shown:
        shown = super().__new__(cls, markdown_text(raw))
        shown.raw = raw
        # In a table a bar ends the cell, also within code.
        shown.code = f"<code>{shown}</code>" if "|" in raw else markdown_code(raw)
        return shown


def shown(value: Any) -> Any:
    """A value with every string in it escaped; a dataclass becomes a dict of its fields."""
    if isinstance(value, str):
        return Shown(value)
    if is_dataclass(value):
        return {field.name: shown(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: shown(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown(each) for each in value]
    return value


def card_values(subject: Subject) -> dict[str, Any]:
    """Everything that the template asks for but metadata."""
    settings = subject.settings
    asked = settings["sparsity"]
    experts = subject.report.experts if subject.report else ()
    values: dict[str, Any] = {
        "name": subject.name,
        "base": subject.base,
        "base_name": subject.base_name,
        "settings": settings,
        "sparsity": asked if isinstance(asked, list) else [("", asked or "the zeros it had")],
        "others": [
            f"{key}={value}"
            for key, value in settings.items()
            if key not in SHOWN and value != subject.defaults.get(key)
        ],
        "data": subject.data,
        "report": _report(subject.report) if subject.report else None,
        "evaluation": subject.evaluation,
        "weight_bytes": subject.weight_bytes,
        "plain": subject.plain,
        "experts": removed_experts(experts) if experts else "",
    }
    return {**shown(values), "snippet": _snippet(subject)}


def _report(report: PruningReport) -> dict[str, Any]:
    errors = {x.name: x.relative_error for x in report.layers if x.relative_error is not None}
    machine = report.environment
    return {
        "sparsity": report.sparsity,
        "layers": len(report.layers),
        "left_dense": len(report.left_dense),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "errors": {
            "mean": fmean(errors.values()),
            "largest": max(errors.values()),
            "worst": max(errors, key=lambda name: errors[name]),
        }
        if errors
        else None,
        "seconds": report.seconds,
        "machine": str(machine) if machine else "",
        "date": report.date,
        "versions": [f"{k} {v}" for k, v in machine.versions.items()] if machine else [],
    }


def _snippet(subject: Subject) -> str:
    """Python that loads the model; the one thing that isn't Markdown."""
    names = [subject.model_class, *(["AutoTokenizer"] if subject.has_tokenizer else [])]
    address = python_string(subject.address)
    lines = [] if subject.plain else ["import hf_sparse  # tells transformers how to read it"]
    lines += [
        f"from transformers import {', '.join(sorted(names))}",
        "",
        f"model = {subject.model_class}.from_pretrained({address})",
    ]
    if subject.has_tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({address})")
    return "\n".join(lines)
