"""Is a sparse product faster than the dense one on this GPU?

Times are those of CUDA graphs on copies of the weight that together exceed the L2 cache several
times, so that launches cost what they cost in a compiled model and weights come from memory. They
are kept with those of CPUs, by the GPU's name.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import timing
from ..timing import Measured
from ..token_classes import TokenClass

COLD_BYTES = 256 << 20
MOST_COPIES = 64
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
) -> dict[str, Measured]:
    """Speed over `F.linear` of a dense weight, by class and way; empty if switched off, or if the
    GPU has no room for it.

    The ways multiply `weight`, which `what` describes. Takes up to three times COLD_BYTES.
    """
    kept = round(20 * int(torch.count_nonzero(dense)) / dense.numel()) * 5
    shape = (dense.shape[0], dense.shape[1])
    measure = functools.partial(_measure, dense, weight, ways)
    try:
        with torch.cuda.device_of(dense):  # type: ignore[no-untyped-call]
            name = f"{what}, {kept} % kept"
            return timing.over_dense(shape, dense.dtype, name, gpu(), classes, measure)
    except torch.OutOfMemoryError:
        return {}


def _measure(
    dense: Tensor, weight: Weight, ways: Mapping[str, Way], tokens: TokenClass
) -> Measured:
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
