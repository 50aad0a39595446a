"""What pruning did: one entry a layer, and totals."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.commit import REPORT_FILE
from ..checkpoint.weight_files import saved_in
from ..core.data_record import DataRecord
from ..core.errors import CheckpointError, PackageError
from ..core.json_records import json_text, parse_json, read_json, read_record
from ..kernels.machine import Environment
from .advice import advise
from .expert_report import MixtureReport, removed_experts


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
        block: the module that was pruned at once with it: a block of the model, or the layer.
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
    block: str = ""

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
        experts: the mixtures that lost experts.
        data: how the calibration data were made; None if there were none.
        seconds: the whole run, data loading included.
        block_seconds: wall time of each block, by its name, in the order of pruning: the forward
            passes that lead to it, its statistics and solving its layers.
        model: the id of the model that was pruned, or its folder's name; "" if it has none.
        config: the arguments of `SparseConfig`, as `SparseConfig.to_dict` gives them: method,
            sparsity, seed, ...
        environment: the machine and the versions; None if they weren't recorded.
        date: when it was done, UTC, in ISO 8601; "" if that wasn't recorded.
    """

    layers: tuple[LayerReport, ...]
    left_dense: Mapping[str, str] = field(default_factory=dict)
    data: DataRecord | None = None
    seconds: float = 0.0
    block_seconds: Mapping[str, float] = field(default_factory=dict)
    model: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Environment | None = None
    date: str = ""
    experts: tuple[MixtureReport, ...] = ()

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

    def totals(self) -> dict[str, float]:
        """What holds for all layers together."""
        return {
            "sparsity": self.sparsity,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_resident": self.bytes_resident,
            "seconds": self.seconds,
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer, its shape as `out` and `in`, its notes as one string."""
        rows = []
        for layer in self.layers:
            out, into = layer.shape
            values = asdict(layer) | {"notes": "; ".join(layer.notes)}
            del values["shape"]
            rows.append({"name": values.pop("name"), "out": out, "in": into, **values})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, totals included."""
        return {**self.totals(), **asdict(self)}

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json_text(self.to_dict())

    @classmethod
    def from_json(cls, text: str, where: str = "the report") -> PruningReport:
        """The report that `to_json` wrote.

        Args:
            text: JSON.
            where: what is read, for the error.

        Raises:
            CheckpointError: it is no JSON, or not that of a report.
        """
        return cls._from_content(parse_json(text, where), where)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> PruningReport | None:
        """The report that was saved with a checkpoint; None if there is none.

        Raises:
            CheckpointError: it is damaged; names the file.
        """
        path = saved_in(Path(folder)) / REPORT_FILE
        try:
            content = read_json(path)
        except FileNotFoundError:
            return None
        return cls._from_content(content, str(path))

    @classmethod
    def _from_content(cls, content: Any, where: str) -> PruningReport:
        report = read_record(cls, content, where)
        for layer in report.layers:
            size = math.prod(layer.shape)
            if not (layer.zeros <= size > 0 and layer.sparsity <= 1 and layer.bytes_before):
                raise CheckpointError(f"{where}: the counts of {layer.name} contradict each other")
        return report

    def to_pandas(self) -> Any:
        """The layers as a `pandas.DataFrame`, one row each; see `rows`.

        Raises:
            PackageError: pandas isn't installed.
        """
        try:
            import pandas
        except ImportError:
            raise PackageError("to_pandas needs pandas: pip install pandas") from None
        return pandas.DataFrame(self.rows())

    def log_to(self, writer: Any) -> None:
        """Log it with a TensorBoard writer: totals at step 0, layers at their place in the depth.

        Args:
            writer: a `torch.utils.tensorboard.SummaryWriter`, or what has its `add_scalar` and
                `add_text`.
        """
        for name, total in self.totals().items():
            writer.add_scalar(f"pruning/{name}", total, 0)
        for step, layer in enumerate(self.layers):
            for name in ("sparsity", "relative_error", "seconds"):
                if (value := getattr(layer, name)) is not None:
                    writer.add_scalar(f"pruning/layers/{name}", value, step)
        writer.add_text("pruning/summary", self.summary(), 0)

    def summary(self) -> str:
        """One line of totals."""
        said = [f"removed {removed_experts(self.experts)}"] if self.experts else []
        if self.layers or not said:
            said.append(self._layer_summary())
        return "; ".join(said)

    def advice(self) -> str:
        """What lost less in no more bytes on a model that was measured; "" if that isn't known."""
        return advise(self.config)

    def _layer_summary(self) -> str:
        if not self.layers:
            return "no layer was pruned"
        share = self.bytes_after / self.bytes_before
        resident = self.bytes_resident / self.bytes_before
        memory = f", {resident:.2f} in memory" if resident > 1.1 * share else ""
        if resident >= 1 > share:
            packs = self.config.get("prefer") != "memory"
            remedy = '; prefer="memory" packs what kernels can multiply' if packs else ""
            memory += f" (the saving is on disk only{remedy})"
        return (
            f"pruned {len(self.layers)} layers to sparsity {self.sparsity:.4f} in "
            f"{self.seconds:.1f} s; their weights take {self.bytes_after / 1e6:.2f} MB, "
            f"{share:.2f} of the {self.bytes_before / 1e6:.2f} MB before{memory}; "
            f"{len(self.left_dense)} stay dense"
        )

    def __str__(self) -> str:
        def cells(layer: LayerReport) -> str:
            error = "-" if layer.relative_error is None else f"{layer.relative_error:.4f}"
            return (
                f"{layer.sparsity:8.4f}  {error:>10}  {layer.format:<7}  "
                f"{layer.bytes_before} -> {layer.bytes_after}"
            )

        heading = "sparsity  rel. error  format   bytes before -> after"
        table = layer_lines(self.layers, heading, cells) if self.layers else []
        lines = [*map(str, self.experts), *table, self.summary(), self.advice()]
        return "\n".join(line for line in lines if line)


def layer_lines(layers: Sequence[Any], heading: str, cells: Callable[[Any], str]) -> list[str]:
    """A table for a terminal: a line a layer, by its name, and its notes below it."""
    width = max([len(layer.name) for layer in layers], default=5)
    lines = [f"{'layer':<{width}}  {heading}"]
    for layer in layers:
        lines.append(f"{layer.name:<{width}}  {cells(layer)}")
        lines += [f"{'':<{width}}  note: {note}" for note in layer.notes]
    return lines
