"""What would have lost less in as many bytes, by what was measured on a real model.

`measured.json` is what `examples/real_model.py` wrote: perplexity and bytes of a row of settings,
e.g. "sparsegpt-50" or "fast-2:4-4bit". Only settings that were measured get advice, and it says on
which model: how much is lost differs from model to model.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import fmean
from typing import Any

from ..config.recipes import get_recipe

# Bytes over dense that count as the same: n:m stores its masks in a little less than bitmasks.
SAME_BYTES = 0.02
# Of the loss in perplexity: what isn't below this is no less, since draws of the data differ.
LESS = 0.9
# Rows without zeros are rounded by it.
ROUNDED_BY = "sparsegpt"
# Arguments that make a method another one than the row's.
OF_RECIPE = ("refit", "target", "metric", "allocation")


@dataclass(frozen=True)
class Measured:
    """A row of the measurements.

    Attributes:
        method: recipe or plain method, "dense" if nothing is pruned.
        zeros: "" for none, a percentage, e.g. "50", or n:m.
        bits: of the codes; 16 without.
        bytes: of the pruned layers on disk, over dense bf16.
        perplexity: mean of its runs.
    """

    method: str
    zeros: str
    bits: int
    bytes: float
    perplexity: float

    @classmethod
    def of(cls, name: str, runs: Sequence[Mapping[str, float]]) -> Measured:
        """From a row's name and runs in the file."""
        method, *rest = name.split("-")
        bits = int(rest.pop().removesuffix("bit")) if rest[-1].endswith("bit") else 16
        shares, scores = ([run[key] for run in runs] for key in ("bytes", "perplexity"))
        return cls(method, rest[0] if rest else "", bits, fmean(shares), fmean(scores))

    @property
    def share(self) -> float:
        """Of the weights that are zero."""
        if ":" not in self.zeros:
            return int(self.zeros or 0) / 100
        kept, of = map(int, self.zeros.split(":"))
        return 1 - kept / of

    def __str__(self) -> str:
        unit = "" if ":" in self.zeros else " %"
        zeros = f"{self.method} {self.zeros}{unit}" if self.zeros else "no zeros"
        bits = "" if self.bits == 16 else f" and {self.bits} bits"
        return f"{zeros}{bits}: {self.perplexity:.1f} in {self.bytes:.2f} of the bytes"


@functools.cache
def measurements() -> Mapping[str, Any]:
    """The file's content."""
    text = files("hf_sparse.pruning").joinpath("measured.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def measured_rows() -> tuple[Measured, ...]:
    """All rows, in the order of the file."""
    rows = measurements()["rows"]
    return tuple(Measured.of(name, row["runs"]) for name, row in rows.items())


def advise(config: Mapping[str, Any], rows: Sequence[Measured] | None = None) -> str:
    """What lost less than these settings in no more bytes; "" if that isn't known.

    Args:
        config: as `SparseConfig.to_dict` gives it.
        rows: measurements; default those of `measured.json`.

    Returns:
        A sentence: the least loss of all, and the least with as many zeros and bits.
    """
    rows = measured_rows() if rows is None else rows
    own = next((row for row in rows if _is_of(row, config)), None)
    if own is None:
        return ""
    found = measurements()
    dense = found["dense"]
    most = dense + LESS * (own.perplexity - dense)
    room = own.bytes + SAME_BYTES
    better = [row for row in rows if row.bytes <= room and row.perplexity <= most]
    alike = [row for row in better if row.bits == own.bits and row.share >= own.share]
    best = [min(kind, key=lambda row: row.perplexity) for kind in (alike, better) if kind]
    if not best:
        return ""
    others = "; ".join(map(str, dict.fromkeys(best)))
    return (
        f"On {found['model']} these settings had perplexity {own.perplexity:.1f} in "
        f"{own.bytes:.2f} of the bytes (dense {dense:.1f}). Less was lost with {others}"
    )


def _is_of(row: Measured, config: Mapping[str, Any]) -> bool:
    """Are these the settings of a row?"""
    method = row.method if row.zeros else ROUNDED_BY
    pattern, sparsity = config.get("pattern"), config.get("sparsity")
    if pattern == "unstructured":
        if not isinstance(sparsity, (int, float)):
            return False
        pattern = f"{100 * sparsity:.6g}" if sparsity else ""
    own = pattern, config.get("method"), config.get("bits") or 16
    if own != (row.zeros, method, row.bits):
        return False
    recipe = get_recipe(method)
    rest = {name: getattr(recipe, name) for name in OF_RECIPE} | {"low_rank": 0, "experts": None}
    return all(config.get(name) == value for name, value in rest.items())
