"""The text of a model card, in Markdown: what was done, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.data_record import DataRecord
from ..evaluation import Evaluation
from ..pruning.report import PruningReport
from .card_results import quality_rows, speed_rows

# Of the config, what the table has lines of its own for, or what says nothing about the model.
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


def card_text(subject: Subject) -> str:
    """All sections, in order."""
    sections = (_summary, _loading, _making, _results, _size, _limits)
    return "\n\n".join(text for section in sections if (text := section(subject)))


def _summary(subject: Subject) -> str:
    base = f"[{subject.base}](https://huggingface.co/{subject.base})" if subject.base else ""
    base = base or (f"`{subject.base_name}`" if subject.base_name else "A model")
    report = subject.report
    share = f"{report.sparsity:.1%} of the weights of {len(report.layers)} layers" if report else ""
    what = f"{share or 'weights'} set to zero by `{subject.settings['method']}`"
    bits, rank = subject.settings.get("bits"), subject.settings.get("low_rank")
    what += f" and the others rounded to {bits} bits" if bits else ""
    what += f", beside a part of rank {rank}" if rank else ""
    return (
        f"# {subject.name}\n\n{base} with {what}, without retraining, stored and computed sparse "
        "by hf_sparse."
    )


def _loading(subject: Subject) -> str:
    names = [subject.model_class, *(["AutoTokenizer"] if subject.has_tokenizer else [])]
    lines = [
        "import hf_sparse  # tells transformers how to read it",
        f"from transformers import {', '.join(sorted(names))}",
        "",
        f'model = {subject.model_class}.from_pretrained("{subject.address}")',
    ]
    if subject.has_tokenizer:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{subject.address}")')
    code = "\n".join(lines)
    return f"## How to load it\n\n```sh\npip install hf-sparse\n```\n\n```python\n{code}\n```"


def _making(subject: Subject) -> str:
    settings, report = subject.settings, subject.report
    rows = [
        ("method", f"`{settings['method']}`"),
        ("sparsity asked for", _plain(settings["sparsity"])),
        *((("sparsity reached", f"{report.sparsity:.4f}"),) if report else ()),
        ("pattern", settings["pattern"]),
        *_data_rows(subject.data),
        ("seed", str(settings["seed"])),
    ]
    others = {
        key: value
        for key, value in settings.items()
        if key not in SHOWN and value != subject.defaults.get(key)
    }
    if others:
        rows.append(("other settings", ", ".join(f"{k}={_plain(v)}" for k, v in others.items())))
    if report is not None:
        rows += _run_rows(report)
    return "## How it was made\n\n" + table(("", ""), rows)


def _data_rows(data: DataRecord | None) -> Iterable[tuple[str, str]]:
    if data is None:
        return [("calibration data", "none")]
    counts = {"samples": data.count, "tokens": data.tokens}
    said = [f"`{data.source}`", *(f"{count} {unit}" for unit, count in counts.items() if count)]
    digest = [("SHA-256 of the data", f"`{data.digest}`")] if data.digest else []
    return [("calibration data", ", ".join(said)), *digest]


def _run_rows(report: PruningReport) -> Iterable[tuple[str, str]]:
    errors = {x.name: x.relative_error for x in report.layers if x.relative_error is not None}
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        mean = sum(errors.values()) / len(errors)
        yield (
            "relative error of layers' outputs",
            f"mean {mean:.4f}, largest {errors[worst]:.4f} (`{worst}`)",
        )
    yield "linear layers left dense", str(len(report.left_dense))
    environment = report.environment
    machine = f" on {environment}" if environment else ""
    yield "time", f"{report.seconds:.1f} s{machine}"
    if report.date:
        yield "date", report.date
    if environment is not None:
        yield "versions", ", ".join(f"{k} {v}" for k, v in environment.versions.items())


def _results(subject: Subject) -> str:
    head = ("", "dense", "sparse", "measured on")
    measured = {
        "Results": list(quality_rows(subject.evaluation)),
        "Speed": list(speed_rows(subject.evaluation)),
    }
    return "\n\n".join(f"## {k}\n\n{table(head, rows)}" for k, rows in measured.items() if rows)


def _size(subject: Subject) -> str:
    report = subject.report
    rows = [("all weight files", "", _megabytes(subject.weight_bytes))]
    if report is not None and report.layers:
        share = f"{_megabytes(report.bytes_after)} ({report.bytes_after / report.bytes_before:.2f})"
        pruned = f"{len(report.layers)} pruned layers, as stored"
        rows.insert(0, (pruned, _megabytes(report.bytes_before), share))
    return "## Size\n\n" + table(("", "dense", "sparse"), rows)


def _limits(subject: Subject) -> str:
    lines = [
        "It needs the package hf_sparse: transformers alone stops with an error that names it.",
        "Pruning makes a model worse than the dense one, more so on text unlike what it was "
        "calibrated with.",
    ]
    if not any(quality_rows(subject.evaluation)):
        lines.append("Its quality was not measured: evaluate it before you rely on it.")
    if subject.base_name:
        lines.append(f"The limits, biases and licence of `{subject.base_name}` hold for it, too.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; what would break out of a cell is made harmless."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _plain(value: Any) -> str:
    """A setting; pairs of regex and sparsity as `regex: sparsity`."""
    if isinstance(value, list | tuple) and all(isinstance(v, list | tuple) for v in value):
        return ", ".join(f"`{k}`: {v}" for k, v in value)
    return f"`{value}`" if isinstance(value, list | tuple) else str(value)
