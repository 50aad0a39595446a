"""Is the sparse product faster than the dense one here? Measured once per shape and machine.

One token's product is timed against `F.linear` of the dense weight, interleaved, each on copies
that together exceed the last private cache, so that the weights come from memory as they do when
a model decodes. Medians are compared; the result is kept in a file in the user's cache folder
and holds for the processor, the number of threads, the library versions, the shape, the dtypes
and the sparsity in steps of 5 %. HF_SPARSE_MEASURE=0 switches measuring off: sparse kernels are
then used wherever they can run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native

SWITCH = "HF_SPARSE_MEASURE"
COLD_BYTES = 16 << 20
ROUNDS = 9


def over_dense(weight: native.T16Weight, dtype: torch.dtype) -> float | None:
    """Speed of the sparse over the dense product at one token of `dtype`; None if switched off."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    known = _read_cache()
    key = _key(weight, dtype)
    if key not in known:
        known[key] = round(_measure(weight, dtype), 3)
        _write_cache(known)
    return known[key]


def _measure(weight: native.T16Weight, dtype: torch.dtype) -> float:
    dense = native.decode(weight).to(dtype)
    x = torch.randn(1, weight.shape[1]).to(dtype)
    copies = max(2, min(16, -(-COLD_BYTES // (dense.numel() * dense.element_size()))))
    weights = [weight, *(_copy(weight) for _ in range(copies - 1))]
    matrices = [dense, *(dense.clone() for _ in range(copies - 1))]
    sparse_seconds, dense_seconds = [], []
    with torch.no_grad():
        for _ in range(ROUNDS):
            sparse_seconds.append(_seconds(lambda w: native.linear(x, w), weights))
            dense_seconds.append(_seconds(lambda m: F.linear(x, m), matrices))
    return statistics.median(dense_seconds[1:]) / statistics.median(sparse_seconds[1:])


def _seconds(call: Callable[[Any], Tensor], operands: list[Any]) -> float:
    started = time.perf_counter()
    for operand in operands:
        call(operand)
    return time.perf_counter() - started


def _copy(weight: native.T16Weight) -> native.T16Weight:
    return native.T16Weight(
        weight.shape,
        weight.dtype,
        weight.masks.clone(),
        weight.tile_base.clone(),
        weight.block_off.clone(),
        weight.values.clone(),
        weight.scales,
        weight.group_size,
    )


def _key(weight: native.T16Weight, dtype: torch.dtype) -> str:
    rows, columns = weight.shape
    sparsity = round(20 * (1 - weight.count / (rows * columns))) * 5
    group = weight.group_size if weight.scales is not None else 0
    parts = (
        processor(),
        f"{torch.get_num_threads()} threads",
        f"torch {torch.__version__}",
        f"{list(native.paths())[-1]} {native.ABI_VERSION}",
        f"{rows}x{columns}",
        f"{weight.dtype} values" + (f" in groups of {group}" if group else ""),
        f"{dtype}",
        f"{sparsity} %",
    )
    return ", ".join(parts).replace("torch.", "")


@functools.cache
def processor() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "hf_sparse" / "speed.json"


def _read_cache() -> dict[str, float]:
    """What was measured before; a file that is missing or damaged counts as empty."""
    try:
        content = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {k: float(v) for k, v in content.items() if isinstance(v, (int, float)) and v > 0}


def _write_cache(content: dict[str, float]) -> None:
    """Replace the file as a whole; a folder that can't be written to means measuring again."""
    file = _cache_file()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            json.dump(content, temporary, indent=1, sort_keys=True)
        os.replace(temporary.name, file)
