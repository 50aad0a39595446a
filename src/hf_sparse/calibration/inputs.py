"""The inputs of a unit's layers: collected by running the unit on every batch.

Layers that are handed the very same tensor (q/k/v, gate/up) share one collector. Which do is seen
on the first batch in which they are called and checked on every later one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from ..errors import SolveError
from ..statistics import Needs, Statistics
from .blocks import Visit
from .statistics import StatisticsCollector


class _AllSeen(Exception):  # noqa: N818 - a signal, no error
    """Every layer of the unit has had its input: the rest of the pass would be wasted."""


class _Regroup(Exception):  # noqa: N818 - a signal, no error
    """Layers that shared an input no longer do."""


def collect_statistics(
    visit: Visit, layers: Mapping[str, nn.Module], needs: Needs
) -> dict[str, Statistics]:
    """Run a visit's unit on all calls and return each layer's statistics, by name.

    Layers with the same input get the same `Statistics` object. A layer that was never called is
    left out: the data lack what would use it, or the model reads its weight by itself.

    Args:
        visit: a unit and the calls that stand in front of it.
        layers: the layers of the unit to watch; inputs are (..., in).
        needs: what to collect.

    Raises:
        SolveError: a layer saw padding alone, or NaN or infinite inputs; names the layer.
    """
    try:
        return _Collection(visit, layers, needs, share=True).result()
    except _Regroup:
        return _Collection(visit, layers, needs, share=False).result()


class _Collection:
    """One run over all calls of a visit."""

    def __init__(
        self, visit: Visit, layers: Mapping[str, nn.Module], needs: Needs, share: bool
    ) -> None:
        self._needs, self._share, self._batches = needs, share, len(visit.calls)
        self._names = {module: name for name, module in layers.items()}
        self._collectors: dict[str, StatisticsCollector] = {}
        self._calls_now: list[str] = []
        self._inputs_now: dict[int, tuple[Tensor, StatisticsCollector]] = {}
        self._token_mask: Tensor | None = None
        self._stop_early = False
        hooked = any(hasattr(m, "_hf_hook") for m in visit.unit.module.modules())
        with self._watching(layers):
            for index, call in enumerate(visit.calls):
                self._calls_now.clear()
                self._inputs_now.clear()
                self._token_mask = call.token_mask
                with suppress(_AllSeen):
                    visit.run(visit.unit, call)
                if index == 0:
                    # Each layer called once: the same will hold for the next batches. Offloading
                    # hooks need the end of the pass to put weights back.
                    self._stop_early = sorted(self._calls_now) == sorted(layers) and not hooked
        self._inputs_now.clear()

    def result(self) -> dict[str, Statistics]:
        finished: dict[int, Statistics] = {}
        statistics: dict[str, Statistics] = {}
        for name in self._names.values():
            collector = self._collectors.get(name)
            if collector is None:
                continue
            try:
                if id(collector) not in finished:
                    finished[id(collector)] = collector.finish()
            except SolveError as error:
                raise SolveError(f"layer {name}: {error}") from None
            statistics[name] = finished[id(collector)]
        return statistics

    @contextmanager
    def _watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        hooks = [m.register_forward_pre_hook(self._see, prepend=True) for m in layers.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name, x = self._names[module], args[0]
        self._calls_now.append(name)
        mine = self._collectors.get(name)
        seen = self._inputs_now.get(id(x)) if self._share else None
        if seen is not None:
            # The same tensor went to another layer of this unit before: counted there.
            if mine not in (None, seen[1]):
                raise _Regroup
            self._collectors[name] = seen[1]
        else:
            if mine is None:
                mine = StatisticsCollector(x.shape[-1], self._needs, self._batches, x.device)
                self._collectors[name] = mine
            elif any(c is mine for _, c in self._inputs_now.values()) and self._is_follower(name):
                raise _Regroup
            mine.add(self._tokens(x))
            self._inputs_now[id(x)] = x, mine
        if self._stop_early and len(self._calls_now) == len(self._names):
            raise _AllSeen

    def _is_follower(self, name: str) -> bool:
        """Does the layer share its collector with another one?"""
        mine = self._collectors[name]
        return sum(collector is mine for collector in self._collectors.values()) > 1

    def _tokens(self, x: Tensor) -> Tensor:
        """The input's rows that are no padding, (tokens, in)."""
        rows = x.detach().reshape(-1, x.shape[-1])
        mask = self._token_mask
        if mask is not None and mask.numel() == rows.shape[0]:
            rows = rows[mask.to(rows.device).flatten()]
        return rows
