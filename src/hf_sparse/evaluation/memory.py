"""Memory that a model and its process take, in bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from ..core.storages import storages

_PROCESS = Path("/proc/self")


def weight_bytes(model: nn.Module) -> int:
    """All parameters and buffers in memory, each storage once; not those on the meta device."""
    held = storages((*model.parameters(), *model.buffers()))
    return sum(storage.nbytes() for storage in held.values())


def resident() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Its highest value since the process began or `reset_peak`; 0 where the system doesn't tell.

    Read from /proc, since psutil tells no peak on Linux.
    """
    with contextlib.suppress(OSError):
        for line in (_PROCESS / "status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def reset_peak(device: torch.device) -> None:
    """Begin a new peak, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            (_PROCESS / "clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Highest memory since `reset_peak`: allocated on a GPU, else resident in the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
