"""What a sparse model's state dict looks like in files."""

from __future__ import annotations

from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming

from ..layers import sparse_layers
from ..layers.held import VALUES, buffer_name
from .headers import PackedLayer, metadata


def sparse_state_dict(
    model: nn.Module, prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model's state dict with packed layers under their file keys, and the files' metadata.

    Tensors that accelerate has offloaded from sparse layers are brought to the CPU.

    Args:
        model: a model, or a module of one.
        prefix: of that module's names in the model, with the dot.
    """
    state: dict[str, Tensor] = dict(model.state_dict(prefix=prefix))
    for local, layer in sparse_layers(model).items():
        name = f"{prefix}{local}".rstrip(".")
        with align_module_device(layer):
            for key in layer.format.specs(layer.shape):
                held = state.pop(f"{name}.{buffer_name(key)}")
                state[f"{name}.{key}"] = _on_cpu(layer.packed[key]) if held.is_meta else held
            if (low_rank := layer.low_rank) is not None:
                for key, tensor in low_rank.tensors().items():
                    if state[f"{name}.{key}"].is_meta:
                        state[f"{name}.{key}"] = _on_cpu(tensor)
            if layer.bias is not None and state[f"{name}.bias"].is_meta:
                state[f"{name}.bias"] = _on_cpu(layer.bias.detach())
    return state, metadata(
        PackedLayer(
            f"{prefix}{name}".rstrip("."),
            layer.format,
            layer.shape,
            layer.axes,
            layer.rank,
            threshold=layer.threshold,
        )
        for name, layer in sparse_layers(model).items()
    )


def _on_cpu(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; of a model without contents as it is."""
    return tensor if tensor.is_meta else tensor.cpu()


class ValuesRenaming(WeightRenaming):
    """Leads the values of packed layers, stored as NAME.weight, into the layers' buffers.

    A dictionary of names instead of one regex per layer: a checkpoint may have thousands.
    """

    __slots__ = ("layers",)

    def __init__(
        self, source_patterns: Any, target_patterns: Any, layers: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(source_patterns, target_patterns)
        self.layers = layers

    @classmethod
    def of(cls, layers: frozenset[str]) -> ValuesRenaming:
        """The renaming for layers with these names in the checkpoint."""
        return cls(r"\.weight$", f".{VALUES}", layers)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        name, _, local = source_key.rpartition(".")
        if local != "weight" or name not in self.layers:
            return source_key, None
        self._was_used = True  # type: ignore[misc]
        return f"{name}.{VALUES}", self.source_patterns[0]
