"""Moving waiting activations off the accelerator, or out of memory, without their owners noticing.

The hidden states of a waiting batch are referred to from many frames of the model's forward pass,
so no reference can be swapped. Their storage can: it is copied to the CPU, or to a file that is
mapped into memory for the copy alone, and shrunk to nothing, and filled again before anyone looks.
On the CPU there is nothing to gain without a file, and nothing is done.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ACCELERATORS = ("cuda", "xpu", "npu", "hpu", "mps")
# Bytes: what is smaller stays where it is when others go to a file.
SMALLEST = 1 << 16


class Parked:
    """The storages inside some arguments that don't stay where they are while their batch waits.

    Args:
        value: nested tuples, lists and dicts with tensors.
        keep: data pointers of storages that others use too: the model's own parameters, the data.
        devices: device types that are worth parking from.
        folder: where files for storages go, those of the CPU too; None to hold copies in memory.
    """

    def __init__(
        self,
        value: Any,
        keep: frozenset[int],
        devices: tuple[str, ...] = ACCELERATORS,
        folder: Path | None = None,
    ) -> None:
        self._folder = folder
        storages = {
            storage.data_ptr(): storage
            for tensor in _tensors(value)
            if (tensor.device.type in devices or (folder and _goes_to_a_file(tensor)))
            and (storage := tensor.untyped_storage()).data_ptr() not in keep
        }
        self._storages = list(storages.values())
        self._copies: list[_Copy] = []

    def away(self) -> None:
        """Copy and free."""
        for storage in self._storages:
            self._copies.append(_Copy(storage, self._folder))
            storage.resize_(0)

    def back(self) -> None:
        """Bring the contents back; a no-op if they are there."""
        for storage, copy in zip(self._storages, self._copies, strict=bool(self._copies)):
            storage.resize_(copy.size)
            copy.into(storage)
        self._copies = []


class _Copy:
    """What a storage held, in memory or in a file that goes when this does."""

    def __init__(self, storage: torch.UntypedStorage, folder: Path | None) -> None:
        self.size = storage.nbytes()
        self._held: Any = None
        self._path: Path | None = None
        if folder is None:
            self._held = storage.cpu().clone()  # type: ignore[no-untyped-call]
        else:
            self._path = folder / secrets.token_hex(16)
            self._mapped().copy_(storage)

    def into(self, storage: torch.UntypedStorage) -> None:
        storage.copy_(self._mapped() if self._held is None else self._held)

    def _mapped(self) -> Any:
        return torch.UntypedStorage.from_file(str(self._path), shared=True, nbytes=self.size)

    def __del__(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _goes_to_a_file(tensor: Tensor) -> bool:
    """Is it one of the hidden states of the CPU: no ids or masks, of which others have views?"""
    storage = tensor.untyped_storage()
    return (
        tensor.device.type == "cpu"
        and tensor.is_floating_point()
        and storage.nbytes() >= SMALLEST
        and storage.resizable()
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
