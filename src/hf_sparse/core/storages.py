"""The memory behind tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Each storage once, by its address; nothing for the meta device.

    A quantised or distributed tensor has no memory of its own: it counts for those it is made of.
    """
    found = {}
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            found |= storages(getattr(tensor, name) for name in names)
        elif not tensor.is_meta:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage
    return found
