"""What was measured on this machine, and the file in the user's cache that keeps it.

HF_SPARSE_MEASURE=0 switches measuring off: sparse kernels are then used wherever they can run.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
LEAST, LARGEST = 1e-9, 1e6  # seconds, or times the dense product: beyond is no measurement

# Rounds go on until both halves of them say the same, but no longer than that; a busy machine gets
# more time until they are near each other, or there is no telling.
SPREAD, SECONDS = 1.05, 0.15
WIDE_SPREAD, MOST_SECONDS = 1.5, 0.5
ROUNDS = 6
LEAST_ROUNDS = 3  # of what takes long

# The thread's own time, where the system counts it finely enough.
_FINE = time.get_clock_info("thread_time").resolution < 1e-6
CLOCK = time.thread_time if _FINE else time.perf_counter

Measured = dict[str, float]


def enabled() -> bool:
    """May anything be measured?"""
    return os.environ.get(SWITCH, "1") != "0"


def over_dense(
    shape: tuple[int, int],
    dtype: torch.dtype,
    what: str,
    machine: str,
    classes: Iterable[TokenClass],
    measure: Callable[[TokenClass], Measured | None],
) -> dict[str, Measured]:
    """Speed over the dense product by class and way, now or before; empty if switched off.

    What is slower at the first class, or can't be measured, is not measured further.

    Args:
        shape, dtype: of the dense weight and of x.
        what: names the sparse weight, and whatever else its times depend on.
        machine: names what computes.
        classes: of numbers of tokens.
        measure: the speed of each way of a class.
    """
    if not enabled():
        return {}
    found: dict[str, Measured] = {}
    for each in classes:
        place = f"{shape[0]}x{shape[1]}, {dtype}, {what}, {each.name} tokens"
        speeds = remembered(f"{machine}, {place}", each.ways, functools.partial(measure, each))
        if speeds is None:
            break
        found[each.name] = speeds
        if len(found) == 1 and max(speeds.values()) < 1:
            break
    return found


def remembered(
    key: str, names: Collection[str], measure: Callable[[], Measured | None]
) -> Measured | None:
    """What was measured under a key, by name; if nothing was, `measure` does, unless it can't."""
    key = f"{key}, torch {torch.__version__}".replace("torch.", "")
    found = read_cache().get(key)
    if found is None or set(found) != set(names):
        found = measure()
        if found is not None:
            found = {name: float(f"{value:.4g}") for name, value in found.items()}
            _write_cache({**read_cache(), key: found})  # others may have written meanwhile
    return found


def compare(
    candidates: Mapping[str, tuple[Callable[[Any], Tensor], Sequence[Any]]],
) -> Measured | None:
    """Seconds of a call by candidate, over its operands; None on a machine too busy to tell.

    Each is timed with one thread, by what that thread itself takes: with several, what else runs on
    the machine decides how long they wait for each other. It can still only add to a time, so each
    operand's least time counts. The candidates take turns, in rounds that are repeated until the
    even and the odd ones agree. Modes that watch torch's functions see nothing of it: their part
    would be a candidate's for each call that it makes.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in candidates}
    started = CLOCK()
    with torch._C.DisableTorchFunction(), torch.no_grad(), _one_thread():
        for rounds in itertools.count():
            for name, (call, operands) in candidates.items():
                seconds[name].append([_seconds(call, operand) for operand in operands])
            if rounds == 0:  # it warms up
                for times in seconds.values():
                    times.clear()
                continue
            taken = CLOCK() - started
            if rounds < (ROUNDS if taken < SECONDS else LEAST_ROUNDS):
                continue
            spread = max(map(_spread, seconds.values()))
            if spread < (SPREAD if taken < SECONDS else WIDE_SPREAD):
                return {name: _least(times) / len(times[0]) for name, times in seconds.items()}
            if taken > MOST_SECONDS:
                break
    return None


def _seconds(call: Callable[[Any], Tensor], operand: Any) -> float:
    started = CLOCK()
    call(operand)
    return CLOCK() - started


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _spread(rounds: Sequence[Sequence[float]]) -> float:
    halves = _least(rounds[::2]), _least(rounds[1::2])
    return max(halves) / min(halves)


def _least(rounds: Sequence[Sequence[float]]) -> float:
    return math.fsum(min(times) for times in zip(*rounds, strict=True))


def cache_file() -> Path:
    """Where what was measured is kept."""
    return platformdirs.user_cache_path("hf_sparse", appauthor=False) / "speed.json"


def read_cache() -> dict[str, Measured]:
    """What was measured before; what is missing, damaged or no time counts as not measured."""
    try:
        stat = cache_file().stat()
        return _read(cache_file(), stat.st_mtime_ns, stat.st_size)
    except (OSError, HfSparseError):
        return {}


@functools.lru_cache(maxsize=1)
def _read(file: Path, changed: int, size: int) -> dict[str, Measured]:
    """A file's content, read once for every layer of a model."""
    content = read_json(file, any_number=True, largest=MOST_BYTES)
    if not isinstance(content, dict):
        return {}
    return {key: found for key, found in content.items() if _is_measured(found)}


def _is_measured(found: object) -> bool:
    return (
        isinstance(found, dict)
        and bool(found)
        and all(type(value) in (int, float) and LEAST < value < LARGEST for value in found.values())
    )


def clear_cache() -> None:
    """Forget what was measured.

    Raises:
        OSError: the file can't be removed.
    """
    cache_file().unlink(missing_ok=True)


def _write_cache(content: dict[str, Measured]) -> None:
    """Replace the file as a whole; a folder that can't be written to means measuring again."""
    file = cache_file()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as temporary:
                json.dump(content, temporary, indent=1, sort_keys=True)
            os.replace(name, file)
        finally:
            Path(name).unlink(missing_ok=True)  # it is there only if that went wrong
