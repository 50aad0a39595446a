"""Memory that a model and its process take, in bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

_PROCESS = Path("/proc/self")


def weight_bytes(model: nn.Module) -> int:
    """All parameters and buffers, each storage once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def resident() -> int:
    """Resident memory of this process; 0 where the system doesn't tell (not Linux)."""
    return _status("VmRSS")


def peak_resident() -> int:
    """Its highest value since the process began or `reset_peak`; 0 where that isn't told."""
    return _status("VmHWM")


def reset_peak(device: torch.device) -> None:
    """Begin a new peak, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (_PROCESS / "clear_refs").exists():
        (_PROCESS / "clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Highest memory since `reset_peak`: allocated on a GPU, else resident in the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


def _status(field: str) -> int:
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(field)), 0)
