"""What pruning did: one entry a layer, and totals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .calibration.data import DataRecord


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer.

    Attributes:
        name: the module's name in the model.
        shape: (out, in).
        pattern: what was asked for.
        format: how it is stored, e.g. "bitmask" or "n:m".
        zeros: number of zeros in the stored weight.
        sparsity: zeros / (out * in).
        relative_error: ||X (W - W^)'|| / ||X W'|| on a sample of the calibration inputs X that
            the layer saw in the pruned model; None if there were no data.
        tokens: calibration tokens that the layer saw; None if there were no data.
        seconds: time to solve it, statistics excluded.
        bytes_before: of the dense weight, in the model's dtype.
        bytes_after: of the stored tensors, on disk.
        bytes_resident: of the tensors in memory, in the form that the kernel uses.
        kernel: what multiplies on this machine.
        notes: what needed attention, e.g. a Hessian that had to be damped more.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    format: str
    zeros: int
    sparsity: float
    relative_error: float | None
    tokens: int | None
    seconds: float
    bytes_before: int
    bytes_after: int
    bytes_resident: int
    kernel: str
    notes: tuple[str, ...] = ()

    def brief(self) -> str:
        """Name, sparsity and error in a few words, for a progress bar."""
        error = "" if self.relative_error is None else f", error {self.relative_error:.3f}"
        return f"{self.name}, sparsity {self.sparsity:.3f}{error}"


@dataclass(frozen=True)
class PruningReport:
    """What `prune` did.

    Attributes:
        layers: the pruned layers, in the order in which they were pruned.
        left_dense: linear layers that were not pruned, with the reason.
        data: how the calibration data were made; None if there were none.
        seconds: the whole run, data loading included.
    """

    layers: tuple[LayerReport, ...]
    left_dense: Mapping[str, str] = field(default_factory=dict)
    data: DataRecord | None = None
    seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned weights."""
        weights = sum(math.prod(layer.shape) for layer in self.layers)
        return sum(layer.zeros for layer in self.layers) / weights if weights else 0.0

    @property
    def bytes_before(self) -> int:
        """Bytes of the pruned weights before, dense."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the pruned weights as stored on disk."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def bytes_resident(self) -> int:
        """Bytes of the pruned weights in memory, on this machine."""
        return sum(layer.bytes_resident for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, totals included."""
        return {
            "sparsity": self.sparsity,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_resident": self.bytes_resident,
            "seconds": self.seconds,
            "data": asdict(self.data) if self.data else None,
            "layers": [asdict(layer) for layer in self.layers],
            "left_dense": dict(self.left_dense),
        }

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def summary(self) -> str:
        """One line of totals."""
        if not self.layers:
            return "no layer was pruned"
        share = self.bytes_after / self.bytes_before
        resident = self.bytes_resident / self.bytes_before
        memory = f", {resident:.2f} in memory" if resident > 1.1 * share else ""
        memory += " (the saving is on disk only)" if resident >= 1 > share else ""
        return (
            f"pruned {len(self.layers)} layers to sparsity {self.sparsity:.4f} in "
            f"{self.seconds:.1f} s; their weights take {self.bytes_after / 1e6:.2f} MB, "
            f"{share:.2f} of the {self.bytes_before / 1e6:.2f} MB before{memory}; "
            f"{len(self.left_dense)} stay dense"
        )

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers], default=5)
        lines = [f"{'layer':<{width}}  sparsity  rel. error  format   bytes before -> after"]
        for layer in self.layers:
            error = "-" if layer.relative_error is None else f"{layer.relative_error:.4f}"
            lines.append(
                f"{layer.name:<{width}}  {layer.sparsity:8.4f}  {error:>10}  {layer.format:<7}  "
                f"{layer.bytes_before} -> {layer.bytes_after}"
            )
            lines += [f"{'':<{width}}  note: {note}" for note in layer.notes]
        return "\n".join([*lines, self.summary()])
