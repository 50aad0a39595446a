"""What a comparison found: values, tables and files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.folder import write_folder
from ...core.data_record import DataRecord
from ...core.json_records import json_text
from ...core.untrusted_text import markdown_text, printable
from ...kernels.machine import Environment
from .plot import draw, require_matplotlib
from .point import ComparisonPoint

VALUES = "comparison.json"
PLOT = "comparison.png"


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. `str` of it is a table.

    Attributes:
        model: the name or path that the model was loaded from, else its class.
        measure: what was evaluated, e.g. "perplexity".
        dense: the dense model's score.
        points: methods in their order, each over all sparsities.
        settings: the arguments of `SparseConfig` that all share, as JSON values.
        methods: each method's own arguments.
        data: how the calibration data were made; None if there were none.
        evaluation: how the evaluation data were made; None if the caller evaluates.
        environment: machine and versions.
    """

    model: str
    measure: str
    dense: float
    points: tuple[ComparisonPoint, ...]
    settings: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    data: DataRecord | None
    evaluation: DataRecord | None
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; scores that aren't finite as None."""
        values = asdict(self)
        points = [p | {"score": _finite(p["score"])} for p in values["points"]]
        return values | {"dense": _finite(self.dense), "points": points}

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json_text(self.to_dict())

    def markdown(self) -> str:
        """The table in Markdown, the errors, and what it was measured with."""
        heading, *rows = ([markdown_text(cell) for cell in row] for row in self._rows())
        rule = ["---"] + ["---:"] * (len(heading) - 1)
        table = "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *rows))
        errors = "\n".join(f"- {markdown_text(line)}" for line in self._errors())
        parts = [table, errors, markdown_text(self._made())]
        return "\n\n".join(part for part in parts if part) + "\n"

    def plot(self) -> Any:
        """Score, time and bytes over sparsity, a line for each method.

        Returns:
            A `matplotlib.figure.Figure`; notebooks show it, `savefig` writes it.

        Raises:
            EvaluationError: matplotlib isn't installed.
        """
        return draw(self.points, self.measure, self.dense)

    def save(self, folder: str | os.PathLike[str], plot: bool = True) -> None:
        """Write comparison.md, comparison.json and comparison.png; all of them or none.

        Args:
            folder: created if it isn't there.
            plot: False leaves the picture out, and removes that of a comparison that was there.

        Raises:
            EvaluationError: the plot needs matplotlib, which isn't installed.
            SaveError: the folder can't be written; what was there before is as it was.
        """
        if plot:
            require_matplotlib()

        def write(staging: str) -> None:
            target = Path(staging)
            (target / "comparison.md").write_text(self.markdown(), encoding="utf-8")
            (target / VALUES).write_text(self.to_json() + "\n", encoding="utf-8")
            if plot:
                self.plot().savefig(target / PLOT, dpi=120)

        replaces = (Path(folder) / VALUES).is_file()
        write_folder(folder, write)
        if replaces and not plot:
            (Path(folder) / PLOT).unlink(missing_ok=True)

    def __str__(self) -> str:
        rows = [[printable(cell) for cell in row] for row in self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
        return "\n".join([*table, *map(printable, [*self._errors(), self._made()])])

    def _rows(self) -> list[list[str]]:
        """The table's cells, headings first."""
        heading = ["method", "sparsity", self.measure, "seconds", "stored, MB", "of dense"]
        heading += ["in memory, MB", "of dense"]
        rows = [["dense", "0", _number(self.dense, 3), *["-"] * 5]]
        for p in self.points:
            rows.append(
                [
                    p.method,
                    str(p.setting),
                    "failed" if p.error else _number(p.score, 3),
                    _number(p.seconds, 1),
                    _number(p.bytes_stored, 2, 1e6),
                    _number(p.share(p.bytes_stored), 3),
                    _number(p.bytes_resident, 2, 1e6),
                    _number(p.share(p.bytes_resident), 3),
                ]
            )
        return [heading, *rows]

    def _errors(self) -> list[str]:
        return [f"{p.method}, {p.setting}: {p.error}" for p in self.points if p.error]

    def _made(self) -> str:
        """With what it was measured, in one line."""
        parts = [self.model]
        if self.data:
            parts.append(f"calibrated on {_described(self.data)}")
        if self.evaluation:
            parts.append(f"evaluated on {_described(self.evaluation)}")
        return "; ".join([*parts, str(self.environment)])


def _described(record: DataRecord) -> str:
    return f"{record.count} samples, {record.tokens} tokens of {record.source}"


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *numbers = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in numbers)]
