"""Which weights a model keeps: remembered at one bit a weight, and compared with later."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from jaxtyping import Bool
from safetensors import safe_open
from torch import Tensor, nn

from ..checkpoint.headers import read_folder
from ..checkpoint.weight_files import weight_files
from ..core.bits import nonzero_bits, unpack_bits
from ..core.errors import TrainingError
from ..core.logging import get_logger
from ..formats import Format
from ..layers import SparseLinear
from ..layers.axes import Axes
from ..layers.select import Target

logger = get_logger(__name__)


class Masks:
    """The masks of some layers of a model, by name; True = kept.

    Those of sparse layers are what the layers' storage keeps, whatever the values, and must stay
    exactly so. Dense layers have zeros outside of their masks and anything within.
    """

    def __init__(self) -> None:
        self._bits: dict[str, Tensor] = {}
        self._columns: dict[str, int] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __contains__(self, name: object) -> bool:
        return name in self._bits

    def __getitem__(self, name: str) -> Bool[Tensor, "out in"]:
        return unpack_bits(self._bits[name], self._columns[name])

    def __setitem__(self, name: str, mask: Bool[Tensor, "out in"]) -> None:
        self._bits[name], self._columns[name] = nonzero_bits(mask), mask.shape[1]

    def check_model(self, model: nn.Module) -> None:
        """Raise a TrainingError with layer and numbers unless a model still has these masks."""
        modules = dict(model.named_modules())
        for name in self:
            module = modules.get(name)
            if module is None:
                raise TrainingError(f"the sparsity pattern broke: {name} is no layer any more")
            if isinstance(module, SparseLinear):
                with torch.no_grad(), align_module_device(module):
                    kept = stored_mask(module.format, module.packed, module.shape)
                self._compare(name, kept, exact=True)
            else:
                with Target(name, module).weight() as weight:
                    self._compare(name, weight != 0, exact=False)

    def check_checkpoint(self, folder: str | os.PathLike[str], model: nn.Module) -> None:
        """The same for the model's checkpoint in a folder; an adapter's folder has none."""
        files = weight_files(Path(folder))
        if not files:
            return
        modules = dict(model.named_modules())
        sparse = {name for name in self if isinstance(modules.get(name), SparseLinear)}
        _, layers = read_folder(folder) if sparse else (files, {})
        where = f" in {os.fspath(folder)}"
        for name in sparse:
            if name not in layers:
                raise TrainingError(f"the sparsity pattern broke: {name} is stored dense{where}")
            layer = layers[name]
            tensors = {key: layer.read(key) for key in layer.format.specs(layer.shape)}
            layer.check(tensors)
            kept = stored_mask(layer.format, tensors, layer.shape)
            self._compare(name, kept, exact=True, where=where)
        dense = {f"{name}.weight": name for name in self if name not in sparse}
        for key, weight in _read(files, dense):
            kept = Axes.of(modules[dense[key]]).matrix(weight) != 0
            self._compare(dense.pop(key), kept, exact=False, where=where)
        if dense:
            logger.warning("%s was not verified%s: it has another name there", min(dense), where)

    def _compare(
        self, name: str, kept: Bool[Tensor, "out in"], exact: bool, where: str = ""
    ) -> None:
        mask = self[name].to(kept.device)
        if kept.shape != mask.shape:
            found = tuple(kept.shape)
            raise TrainingError(
                f"the sparsity pattern broke: {name} has shape {found}{where}, at the start it "
                f"had {tuple(mask.shape)}"
            )
        outside = int((kept & ~mask).sum())
        lost = int((mask & ~kept).sum()) if exact else 0
        if outside or lost:
            raise TrainingError(
                f"the sparsity pattern broke: {name} has {outside} weights outside of its mask and "
                f"lacks {lost} of the {int(mask.sum())} in it{where}; something else than the "
                "optimiser has written to the layer"
            )


def stored_mask(
    fmt: Format, tensors: Mapping[str, Tensor], shape: tuple[int, int]
) -> Bool[Tensor, "out in"]:
    """What packed tensors keep; of codes, those that aren't 0."""
    if fmt.grid is not None:
        return fmt.unpack(tensors, shape, torch.float32) != 0
    ones = torch.ones_like(tensors["weight"], dtype=torch.bool)
    return fmt.unpack({**tensors, "weight": ones}, shape, torch.bool)


def _read(files: list[Path], keys: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Those of the tensors that the files have."""
    for path in files if keys else []:
        with safe_open(path, framework="pt") as file:
            for key in set(file.keys()) & set(keys):
                yield key, file.get_tensor(key)
