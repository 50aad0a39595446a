"""Speed-ups that were measured on this machine, and the file in the user's cache that keeps them.

What was measured holds for the processor, the number of threads, the library versions, the shape,
the dtypes and the sparsity in steps of 5 %. HF_SPARSE_MEASURE=0 switches measuring off: sparse
kernels are then used wherever they can run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor

from ..core.errors import HfSparseError
from ..core.json_records import read_json
from .token_classes import TokenClass

SWITCH = "HF_SPARSE_MEASURE"
MOST_BYTES = 16 << 20  # of the file: more is none of ours
FASTEST = 1e6  # times the dense product: more is no measurement

Speeds = dict[str, float]


def enabled() -> bool:
    """May anything be measured?"""
    return os.environ.get(SWITCH, "1") != "0"


def over_dense(
    shape: tuple[int, int],
    dtype: torch.dtype,
    what: str,
    machine: str,
    classes: Iterable[TokenClass],
    measure: Callable[[TokenClass], Speeds],
) -> dict[str, Speeds]:
    """Speed over the dense product by class and way, now or before; empty if switched off.

    What is slower at the first class is not measured further.

    Args:
        shape, dtype: of the dense weight and of x.
        what: names the sparse weight, and whatever else its times depend on.
        machine: names what computes.
        classes: of numbers of tokens.
        measure: the speed of each way of a class.
    """
    if not enabled():
        return {}
    found: dict[str, Speeds] = {}
    for each in classes:
        place = f"{shape[0]}x{shape[1]}, {dtype}, {what}, {each.name} tokens"
        key = f"{machine}, torch {torch.__version__}, {place}".replace("torch.", "")
        found[each.name] = _remembered(key, each.ways, functools.partial(measure, each))
        if len(found) == 1 and max(found[each.name].values()) < 1:
            break
    return found


def _remembered(key: str, ways: Iterable[str], measure: Callable[[], Speeds]) -> Speeds:
    known = _read_cache()
    speeds = known.get(key)
    if speeds is None or set(speeds) != set(ways):
        speeds = {name: round(value, 3) for name, value in measure().items()}
        _write_cache({**known, key: speeds})
    return speeds


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
    return platformdirs.user_cache_path("hf_sparse", appauthor=False) / "speed.json"


def _read_cache() -> dict[str, Speeds]:
    """What was measured before; what is missing, damaged or no speed counts as not measured."""
    try:
        content = read_json(_cache_file(), any_number=True, largest=MOST_BYTES)
    except (OSError, HfSparseError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: speeds for key, speeds in content.items() if _are_speeds(speeds)}


def _are_speeds(found: object) -> bool:
    return (
        isinstance(found, dict)
        and bool(found)
        and all(type(speed) in (int, float) and 0 < speed < FASTEST for speed in found.values())
    )


def _write_cache(content: dict[str, Speeds]) -> None:
    """Replace the file as a whole; a folder that can't be written to means measuring again."""
    file = _cache_file()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, delete=False, encoding="utf-8"
        ) as temporary:
            json.dump(content, temporary, indent=1, sort_keys=True)
        try:
            os.replace(temporary.name, file)
        except OSError:
            os.unlink(temporary.name)
