"""`hf-sparse inspect`: what is in a sparse checkpoint, from its headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ..command import Command
from ..headers import Headers, StoredLayer, read_headers
from ..models import Model, Revision, read_config, require_sparse
from ..sections import OUTPUT

HEADINGS = ("layers", "", "shape", "format", "values", "sparsity", "MB", "of dense")
MADE_BY = ("method", "sparsity", "pattern")


@dataclass(frozen=True)
class Inspection:
    """What is stored.

    Attributes:
        model: its folder or Hub id.
        config: the quantization_config in its config.json: how it was made.
        headers: what the files hold.
        all_layers: print each layer, not one line for those that differ by a number only.
    """

    model: str
    config: Mapping[str, Any]
    headers: Headers
    all_layers: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, totals included."""
        headers = self.headers
        return {
            "model": self.model,
            "config": self.config,
            "files": headers.files,
            "tensors": headers.tensors,
            "bytes": headers.bytes,
            "bytes_packed": sum(layer.bytes for layer in headers.layers),
            "layers": [vars(layer) for layer in headers.layers],
        }

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[StoredLayer]] = {}
        for layer in self.headers.layers:
            name = (
                layer.name if self.all_layers else re.sub(r"(?<![^.])\d+(?![^.])", "*", layer.name)
            )
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            groups.setdefault((name, shape, layer.format, layer.dtype), []).append(layer)
        rows = [HEADINGS, *(_row(key, layers) for key, layers in groups.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        made = [f"{key} {self.config[key]}" for key in MADE_BY if key in self.config]
        packed = sum(layer.bytes for layer in self.headers.layers)
        total = (
            f"{len(self.headers.layers)} packed layers, {packed / 1e6:.2f} MB; all "
            f"{self.headers.tensors} tensors in {self.headers.files} files, "
            f"{self.headers.bytes / 1e6:.2f} MB"
        )
        return "\n".join([f"{self.model}: {', '.join(made)}", *table, total])


def _row(key: tuple[str, ...], layers: list[StoredLayer]) -> tuple[str, ...]:
    """One line for layers of one shape and format."""
    name, *how = key
    known = sorted(layer.sparsity for layer in layers if layer.sparsity is not None)
    ends = list(dict.fromkeys(f"{value:.4f}" for value in (*known[:1], *known[-1:])))
    stored = sum(layer.bytes for layer in layers)
    dense = sum(layer.bytes_dense or 0 for layer in layers)
    share = f"{stored / dense:.3f}" if dense else "-"
    return (name, f"x{len(layers)}", *how, " to ".join(ends) or "-", f"{stored / 1e6:.2f}", share)


def inspect(
    model: Model,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="A line for each layer.", rich_help_panel=OUTPUT),
    ] = False,
    revision: Revision = None,
) -> Inspection:
    """Show what is in a sparse checkpoint.

    Only headers are read, also from the Hub. Layers whose names differ by a number only are one
    line. The share is that of the dense weight in the dtype of the stored values.
    """
    config = read_config(model, revision)
    require_sparse(model, config)
    headers = read_headers(model, revision, config)
    return Inspection(model, config["quantization_config"], headers, layers)


COMMAND = Command(
    "inspect",
    inspect,
    ("hf-sparse inspect opt-sparse", "hf-sparse inspect me/opt-sparse --layers --json"),
)
