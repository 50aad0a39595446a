"""What holds for all kernels on a GPU: is sparse faster there, and may dense take its place?

Times are those of CUDA graphs on copies of the weight that together exceed the L2 cache several
times, so that launches cost what they cost in a compiled model and weights come from memory. They
are kept with those of CPUs (`speed`), by the GPU's name.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import speed
from .base import Stored
from .products import TokenClass

COLD_BYTES = 256 << 20
MOST_COPIES = 64
FREE_SHARE = 0.25  # of the GPU's memory that dense weights must leave free: for the cache, say
REPLAYS = 15

Item = TypeVar("Item")
Way = Callable[[Tensor, Any], Tensor]


class Weight(Protocol):
    """A packed weight that can be copied."""

    @property
    def nbytes(self) -> int: ...

    def copy(self) -> Any: ...


def gpu() -> str:
    """The current GPU's name, and what its times depend on."""
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def over_dense(
    dense: Tensor, weight: Weight, ways: Mapping[str, Way], classes: Sequence[TokenClass], what: str
) -> dict[str, speed.Speeds]:
    """Speed over `F.linear` of a dense weight, by class and way; empty if switched off.

    The ways multiply `weight`, which `what` describes. Takes up to three times COLD_BYTES.
    """
    kept = round(20 * int(torch.count_nonzero(dense)) / dense.numel()) * 5
    shape = (dense.shape[0], dense.shape[1])
    found = {}
    for each in classes:
        measure = functools.partial(_measure, dense, weight, ways, each)
        name = f"{what}, {kept} % kept, {each.name} tokens"
        with torch.cuda.device_of(dense):  # type: ignore[no-untyped-call]
            speeds = speed.remembered(shape, dense.dtype, name, measure, gpu())
        if speeds is None:
            return {}
        found[each.name] = speeds
    return found


def _measure(
    dense: Tensor, weight: Weight, ways: Mapping[str, Way], tokens: TokenClass
) -> speed.Speeds:
    x = torch.randn(tokens.measured, dense.shape[1], dtype=dense.dtype, device=dense.device)
    matrices = cold_copies(dense, torch.clone, dense.nbytes)
    weights = cold_copies(weight, lambda own: own.copy(), weight.nbytes)
    reference, *others = graph_seconds(
        [functools.partial(F.linear, x, each) for each in matrices],
        *([functools.partial(ways[name], x, each) for each in weights] for name in tokens.ways),
    )
    return {name: reference / found for name, found in zip(tokens.ways, others, strict=True)}


def cold_copies(first: Item, copy: Callable[[Item], Item], nbytes: int) -> list[Item]:
    """So many that going through them all finds none in the cache."""
    return [first, *(copy(first) for _ in range(min(MOST_COPIES, COLD_BYTES // nbytes)))]


@torch.no_grad()
def graph_seconds(*alternatives: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of a call of each alternative, the median.

    An alternative's calls are one CUDA graph; the graphs are replayed in turn.
    """
    graphs = [_captured(calls) for calls in alternatives]
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(REPLAYS):
        for graph, found in zip(graphs, times, strict=True):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
    return [
        statistics.median(found[2:]) / len(calls)
        for found, calls in zip(times, alternatives, strict=True)
    ]


def _captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and lets libraries choose, before anything is captured
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def dense_cost(stored: Stored) -> str | None:
    """Why the dense weight can't stand beside the rest on its GPU; None if it can."""
    needed = math.prod(stored.shape) * stored.dtype.itemsize
    free, total = torch.cuda.mem_get_info(stored.device)
    # What torch holds and uses no more, as after measuring, is free, too.
    free += torch.cuda.memory_reserved(stored.device) - torch.cuda.memory_allocated(stored.device)
    if free - needed >= FREE_SHARE * total:
        return None
    return (
        f"a dense weight would take {needed >> 20} MB, "
        f"{free >> 20} of {total >> 20} MB are free and {FREE_SHARE:.0%} must stay so"
    )
