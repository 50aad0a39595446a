"""Is the sparse product faster than the dense one here? Measured once per shape and machine.

For each class of products (`products.CLASSES`) each way is timed against `F.linear` of the dense
weight, interleaved, and medians are compared. Few tokens are timed on copies that together exceed
the last private cache, so that the weights come from memory as they do when a model decodes; many
tokens, where arithmetic is what takes time, on the first rows of the weight. What is slower than
dense at one token stays dense, so the other classes are then left out.

The result is kept in a file in the user's cache folder and holds for the processor, the number of
threads, the library versions, the shape, the dtypes and the sparsity in steps of 5 %.
HF_SPARSE_MEASURE=0 switches measuring off: sparse kernels are then used wherever they can run.
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
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .packed import ROWS, T16Weight
from .panels import decode
from .products import CLASSES, WAYS, TokenClass

SWITCH = "HF_SPARSE_MEASURE"
COLD_BYTES = 16 << 20
COLD_TOKENS = 32  # up to so many the weight's way from memory counts
WARM_WEIGHTS = 1 << 21  # of a thread, beyond
COLD_ROUNDS, WARM_ROUNDS = 8, 3

Speeds = dict[str, float]


def enabled() -> bool:
    """May anything be measured?"""
    return os.environ.get(SWITCH, "1") != "0"


def over_dense(weight: T16Weight, dtype: torch.dtype) -> dict[str, Speeds]:
    """Speed over the dense product with x of `dtype`, by class and way; empty if switched off."""
    sparsity = round(20 * (1 - weight.count / (weight.shape[0] * weight.shape[1]))) * 5
    group = weight.group_size if weight.scales is not None else 0
    values = f"{weight.dtype} values" + (f" in groups of {group}" if group else "")
    found = {}
    for each in CLASSES:
        what = f"{values}, {sparsity} %, {each.name} tokens"
        speeds = remembered(
            weight.shape, dtype, what, functools.partial(_measure, weight, dtype, each)
        )
        if speeds is None:
            return {}
        found[each.name] = speeds
        if max(speeds.values()) < 1 and each is CLASSES[0]:
            break
    return found


def remembered(
    shape: tuple[int, int],
    dtype: torch.dtype,
    what: str,
    measure: Callable[[], Speeds],
    machine: str | None = None,
) -> Speeds | None:
    """What `measure` found on this machine, now or before; None if switched off.

    `machine` names what computes, by default the processor with its threads and native path.
    """
    if not enabled():
        return None
    if machine is None:
        path = f"{list(native.paths())[-1]} {native.ABI_VERSION}"
        machine = f"{processor()}, {torch.get_num_threads()} threads, {path}"
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


def copies_of(nbytes: int) -> int:
    """How many of that size exceed the private caches."""
    return max(2, min(16, -(-COLD_BYTES // nbytes)))


def _measure(weight: T16Weight, dtype: torch.dtype, tokens: TokenClass) -> Speeds:
    """Speed over dense of each way that the class may take."""
    cold = tokens.measured <= COLD_TOKENS
    if not cold:
        weight = _first_rows(weight, WARM_WEIGHTS * torch.get_num_threads())
    dense = decode(weight).to(dtype)
    x = torch.randn(tokens.measured, weight.shape[1]).to(dtype)
    copies = copies_of(dense.nbytes) if cold else 1
    weights = [weight, *(_copy(weight) for _ in range(copies - 1))]
    matrices = [dense, *(dense.clone() for _ in range(copies - 1))]
    seconds = compare(
        {
            **{way: (functools.partial(_call, WAYS[way], x), weights) for way in tokens.ways},
            "dense": (lambda matrix: F.linear(x, matrix), matrices),
        },
        COLD_ROUNDS if cold else WARM_ROUNDS,
    )
    return {way: seconds["dense"] / seconds[way] for way in tokens.ways}


def _call(way: Callable[..., Tensor], x: Tensor, weight: T16Weight) -> Tensor:
    return way(x, weight, None)


def _copy(weight: T16Weight) -> T16Weight:
    return replace(
        weight,
        masks=weight.masks.clone(),
        tile_base=weight.tile_base.clone(),
        block_off=weight.block_off.clone(),
        values=weight.values.clone(),
    )


def _first_rows(weight: T16Weight, weights: int) -> T16Weight:
    """A view of the first tiles with about that many weights."""
    rows, columns = weight.shape
    tiles = max(1, weights // (columns * ROWS))
    if tiles * ROWS >= rows:
        return weight
    return replace(
        weight,
        shape=(tiles * ROWS, columns),
        masks=weight.masks[:tiles],
        tile_base=weight.tile_base[: tiles + 1],
        block_off=weight.block_off[:tiles],
        scales=None if weight.scales is None else weight.scales[:tiles],
    )


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
