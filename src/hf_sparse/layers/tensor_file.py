"""Tensors of a layer that accelerate has on disk, in a file that lasts as long as they are used."""

from __future__ import annotations

import os
import secrets
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import CheckpointError, SaveError


class TensorFile(Mapping[str, Tensor]):
    """Writes tensors to a file of its own and reads them anew at each access, on the CPU.

    The file is removed when nothing refers to this any more, at the latest when the process ends.

    Args:
        tensors: by name.
        folder: for the file, and others' files; None for the system's temporary folder.

    Raises:
        SaveError: the file can't be written; nothing is left of it.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], folder: str | os.PathLike[str] | None
    ) -> None:
        self.folder = Path(folder or tempfile.gettempdir()).absolute()
        self._path = self.folder / f"hf_sparse-{secrets.token_hex(16)}.safetensors"
        self._names = tuple(tensors)
        weakref.finalize(self, _remove, self._path, os.getpid())
        # The format takes no tensors that share their memory or have strides of their own.
        own = {k: t.clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
        try:
            save_file(own, self._path)
        except (OSError, SafetensorError) as error:
            self._path.unlink(missing_ok=True)
            raise SaveError(
                f"{self._path}: a layer that is offloaded to disk can't be written: {error}. Free "
                "space there, or pass another offload_folder"
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            with safe_open(self._path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self._path}: a layer that is offloaded to disk can't be read: {error}. Was the "
                "file removed? Load the model anew"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorFile:
        return self  # never written again, and gone when no copy of the model is left


def held_alike(tensors: Mapping[str, Tensor], before: Any) -> Mapping[str, Tensor]:
    """Tensors of an offloaded layer where its predecessor's are: in memory, or in a file.

    Args:
        tensors: on the CPU, by name.
        before: where accelerate has the predecessor's, `AlignDevicesHook.weights_map`.

    Raises:
        SaveError: the file can't be written.
    """
    folder = None
    if isinstance(before, PrefixedDataset):
        loader = before.dataset
        if not isinstance(loader, OffloadedWeightsLoader):
            return tensors
        if f"{before.prefix}weight" in loader.state_dict:
            return tensors
        folder = loader.save_folder
    elif isinstance(before, TensorFile):
        folder = before.folder
    elif before is None or isinstance(before, dict):
        return tensors
    return TensorFile(tensors, folder)


def _remove(path: Path, owner: int) -> None:
    """Not where a forked process ends, whose parent goes on."""
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
