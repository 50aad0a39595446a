"""Speed-ups that were measured on this machine, and the file in the user's cache that keeps them.

What was measured holds for the processor, the number of threads, the library versions, the shape,
the dtypes and the sparsity in steps of 5 %. HF_SPARSE_MEASURE=0 switches measuring off: sparse
kernels are then used wherever they can run.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SWITCH = "HF_SPARSE_MEASURE"

Speeds = dict[str, float]


def enabled() -> bool:
    """May anything be measured?"""
    return os.environ.get(SWITCH, "1") != "0"


def remembered(
    shape: tuple[int, int],
    dtype: torch.dtype,
    what: str,
    measure: Callable[[], Speeds],
    machine: str,
) -> Speeds | None:
    """What `measure` found on this machine, now or before; None if switched off.

    `machine` names what computes, and whatever else its times depend on.
    """
    if not enabled():
        return None
    parts = (
        machine,
        f"torch {torch.__version__}",
        f"{shape[0]}x{shape[1]}",
        f"{dtype}",
        what,
    )
    key = ", ".join(parts).replace("torch.", "")
    known = _read_cache()
    if key not in known:
        known[key] = {name: round(value, 3) for name, value in measure().items()}
        _write_cache(known)
    return known[key]


def compare(
    candidates: Mapping[str, tuple[Callable[[Any], Tensor], list[Any]]], rounds: int
) -> Speeds:
    """Median seconds of a round by candidate: each calls its function with all its operands."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad():
        for _ in range(rounds + 1):  # the first warms up
            for name, (call, operands) in candidates.items():
                started = time.perf_counter()
                for operand in operands:
                    call(operand)
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "hf_sparse" / "speed.json"


def _read_cache() -> dict[str, Speeds]:
    """What was measured before; a file that is missing or damaged counts as empty."""
    try:
        content = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: speeds for key, speeds in content.items() if _are_speeds(speeds)}


def _are_speeds(found: object) -> bool:
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(speed, (int, float)) and speed > 0 for speed in found.values())
    )


def _write_cache(content: dict[str, Speeds]) -> None:
    """Replace the file as a whole; a folder that can't be written to means measuring again."""
    file = _cache_file()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            json.dump(content, temporary, indent=1, sort_keys=True)
        os.replace(temporary.name, file)
