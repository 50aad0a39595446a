"""Moving waiting activations off the accelerator without their owners noticing.

The hidden states of a waiting batch are referred to from many frames of the model's forward pass,
so no reference can be swapped. Their storage can: it is copied to the CPU and shrunk to nothing,
and filled again before anyone looks. On the CPU there is nothing to gain and nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Parked:
    """The accelerator storages inside some arguments, for as long as their batch waits.

    Args:
        value: nested tuples, lists and dicts with tensors.
        keep: data pointers of storages that others use too: the model's own parameters.
        devices: device types that are worth parking from.
    """

    def __init__(
        self,
        value: Any,
        keep: frozenset[int],
        devices: tuple[str, ...] = ("cuda", "xpu", "npu", "hpu", "mps"),
    ) -> None:
        storages = {
            storage.data_ptr(): storage
            for tensor in _tensors(value)
            if tensor.device.type in devices
            and (storage := tensor.untyped_storage()).data_ptr() not in keep
        }
        self._storages = list(storages.values())
        self._copies: list[torch.UntypedStorage] = []

    def away(self) -> None:
        """Copy to the CPU and free."""
        self._copies = [s.cpu().clone() for s in self._storages]  # type: ignore[no-untyped-call]
        for storage in self._storages:
            storage.resize_(0)

    def back(self) -> None:
        """Bring the contents back; a no-op if they are there."""
        for storage, copy in zip(self._storages, self._copies, strict=bool(self._copies)):
            storage.resize_(copy.nbytes())
            storage.copy_(copy)
        self._copies = []


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
