"""What merging an adapter did: to each layer, and to the outputs of the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...core.data_record import DataRecord
from ...core.json_records import json_text
from ...pruning.report import layer_lines


@dataclass(frozen=True)
class LayerMerge:
    """One sparse layer that an adapter was merged into.

    Attributes:
        name: the layer's name in the base model.
        zeros: zeros of its sparse weight, the same before and after.
        sparsity: zeros / (out * in).
        weight_error: ||V - T|| / ||T||, Frobenius, T the weight with the adapter added.
        output_error: ||X (V - T)'|| / ||X T'|| on a sample of the inputs X that the layer sees in
            the model merged up to there; None if there were no data.
        tokens: calibration tokens that the layer saw; None if there were no data.
        notes: what needed attention.
    """

    name: str
    zeros: int
    sparsity: float
    weight_error: float
    output_error: float | None
    tokens: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fidelity:
    """The merged model's outputs against the unmerged one's, over all tokens of the data.

    Attributes:
        output_error: ||Y - Y'|| / ||Y'||, Frobenius, Y the logits, or the last hidden states of a
            model without logits; Y' of the unmerged model.
        kl_divergence: mean of KL(unmerged || merged) over the positions, in nats; None without
            logits.
        tokens: number of positions.
    """

    output_error: float
    kl_divergence: float | None
    tokens: int


@dataclass(frozen=True)
class MergeReport:
    """What `merge_adapter` did.

    Attributes:
        policy: "masked" or "resolve".
        adapters: names of the adapters that were merged.
        layers: the sparse layers that they changed, in the order in which they were merged.
        fidelity: of the whole model; None if there were no data.
        data: how the data were made; None if there were none.
        seconds: the whole run.
    """

    policy: str
    adapters: tuple[str, ...]
    layers: tuple[LayerMerge, ...]
    fidelity: Fidelity | None
    data: DataRecord | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json_text(self.to_dict())

    def summary(self) -> str:
        """One line of totals."""
        names = ", ".join(repr(name) for name in self.adapters)
        text = f"merged {names} into {len(self.layers)} sparse layers, {self.policy}"
        if self.layers:
            mean = sum(layer.weight_error for layer in self.layers) / len(self.layers)
            text += f": weights are {mean:.4f} from the unmerged ones in the mean"
        if self.fidelity is not None:
            text += f", the model's outputs {self.fidelity.output_error:.4f}"
            if self.fidelity.kl_divergence is not None:
                text += f" (KL divergence {self.fidelity.kl_divergence:.5f} nats)"
        return text

    def __str__(self) -> str:
        def cells(layer: LayerMerge) -> str:
            error = "-" if layer.output_error is None else f"{layer.output_error:.4f}"
            return f"{layer.sparsity:8.4f}  {layer.weight_error:12.4f}  {error:>12}"

        heading = "sparsity  weight error  output error"
        return "\n".join([*layer_lines(self.layers, heading, cells), self.summary()])
