"""The inputs of a block's layers: collected by running the block on every batch.

Layers that are handed the very same tensor (q/k/v, gate/up) share one collector, for as long as
they are.

If the walk carries the dense model along, each call's dense twin runs first, so that the inputs
of the same tokens in the dense model are at hand when the pruned ones are counted.

The layers of an expert see the tokens that are routed to it, in the order of the tokens; which
ones these are is told by the choice that their `SparseExperts` is called with. A token that the
dense model routes elsewhere has no dense input there: its own stands in for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.errors import SolveError
from ..core.precision import full_precision
from ..core.statistics import Needs, Statistics
from ..layers.axes import Axes
from ..layers.experts import SparseExperts, chosen_slots
from .block_walk import Call, Visit
from .feeding_order import stream_input
from .padding import Padding
from .sums import StatisticsCollector


@dataclass(frozen=True)
class DensePath:
    """How to run a block as it was before it was pruned.

    Attributes:
        weights: a context in which the block's layers have their dense weights.
        leave: the dense passes need not come back to this block: let them go on to the next.
        writers: the layers that write to the residual stream, in order, with their factors.
    """

    weights: Callable[[], AbstractContextManager[None]]
    leave: bool = False
    writers: Mapping[str, nn.Module] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Observed:
    """What was seen of one layer.

    Attributes:
        statistics: the same object for layers with the same input.
        residual: (Rd - R)' X / (c T), what the layer's output must make up for of the residual
            stream before it, R here and Rd in the dense model; None without a dense path or if
            the layer does not write to the stream (factor c).
        note: what a reader of the report should know of the statistics.
    """

    statistics: Statistics
    residual: Float[Tensor, "out in"] | None = None
    note: str | None = None


class _AllSeen(Exception):  # noqa: N818 - a signal, no error
    """Every layer of the block has had its input: the rest of the pass would be wasted."""


def find_experts(
    block: nn.Module, layers: Mapping[str, nn.Module]
) -> dict[nn.Module, tuple[SparseExperts, int]]:
    """Those of a block's layers that belong to an expert, with its module and its number there."""
    wanted = set(layers.values())
    return {
        layer: (experts, index)
        for experts in block.modules()
        if isinstance(experts, SparseExperts)
        for index in range(experts.num_experts)
        for layer in experts.layers(index)
        if layer in wanted
    }


def collect_statistics(
    visit: Visit,
    layers: Mapping[str, nn.Module],
    needs: Needs,
    dense: DensePath | None = None,
    everywhere: bool = False,
) -> dict[str, Observed]:
    """Run a visit's block on all calls and return what was seen of each layer, by name.

    A layer that was never called is left out: the data lack what would use it, or the model reads
    its weight by itself.

    Args:
        visit: a block and the calls that stand in front of it.
        layers: the layers of the block to watch; inputs are (..., in), a convolution's have the
            channels where it has them.
        needs: what to collect.
        dense: also collect cross moments and residuals against the dense model.
        everywhere: the layers are experts' and are to see all tokens that enter the experts; the
            block's output is that of the routed ones all the same.

    Raises:
        SolveError: a layer saw padding alone, or NaN or infinite inputs; names the layer.
    """
    return _Collection(visit, layers, needs, dense, everywhere).result()


@dataclass
class _Pass:
    """One pass through the block: each layer's inputs in the order of its calls, without padding.

    Layers that were handed the same tensor have the same object here. Of experts' layers the
    tokens' numbers are kept as well.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    routed: dict[str, list[Tensor]] = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)
    by_tensor: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def calls(self) -> int:
        return sum(len(inputs) for inputs in self.inputs.values())


@dataclass
class _Group:
    """Layers that have had the same inputs so far."""

    names: list[str]
    collector: StatisticsCollector


class _Routed(NamedTuple):
    """Of an expert's layer: which of its rows are no padding, and the tokens that those are."""

    rows: Tensor
    tokens: Tensor


class _Collection:
    """One run over all calls of a visit."""

    def __init__(
        self,
        visit: Visit,
        layers: Mapping[str, nn.Module],
        needs: Needs,
        dense: DensePath | None,
        everywhere: bool,
    ) -> None:
        self._visit, self._needs, self._dense = visit, needs, dense
        self._names = {module: name for name, module in layers.items()}
        self._experts = find_experts(visit.block.module, layers)
        self._choices: dict[SparseExperts, Tensor] = {}
        self._everywhere, self._beside = everywhere, False
        self._groups: list[_Group] = []
        self._residuals: dict[str, Tensor] = {}
        self._strays: Counter[str] = Counter()  # tokens without a dense input
        self._now = _Pass()
        self._stream: Tensor | None = None
        self._padding = Padding()
        self._stop_early = False
        hooked = any(hasattr(m, "_hf_hook") for m in visit.block.module.modules())
        with self._watching(layers):
            for index, call in enumerate(visit.calls):
                self._padding = call.padding
                twin = self._pass_dense(index, dense) if dense is not None else None
                own = self._pass(call, partial(visit.run, visit.block, call))
                if index == 0:
                    # Each layer called once: the same will hold for the next batches. Offloading
                    # hooks need the end of the pass to put weights back.
                    once = all(len(own.inputs.get(name, ())) == 1 for name in layers)
                    self._stop_early = once and not hooked
                self._count(own, twin)

    def result(self) -> dict[str, Observed]:
        finished: dict[str, Statistics] = {}
        for group in self._groups:
            try:
                statistics = group.collector.finish()
            except SolveError as error:
                raise SolveError(f"layer {group.names[0]}: {error}") from None
            finished.update(dict.fromkeys(group.names, statistics))
        observed = {}
        for name in self._names.values():
            if name not in finished:
                continue
            residual = self._residuals.get(name)
            if residual is not None:
                residual = residual / finished[name].tokens
            observed[name] = Observed(finished[name], residual, self._note(name))
        return observed

    def _note(self, name: str) -> str | None:
        strays = self._strays[name]
        if not strays:
            return None
        return f"the dense model sends {strays} of its tokens elsewhere: its own outputs stay there"

    @contextmanager
    def _watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        with ExitStack() as stack:
            for experts in {experts for experts, _ in self._experts.values()}:
                hook = experts.register_forward_pre_hook(self._enter, with_kwargs=True)
                stack.callback(hook.remove)
            for module in layers.values():
                hook = module.register_forward_pre_hook(self._see, prepend=True)
                stack.callback(hook.remove)
            if self._dense is not None and self._dense.writers:
                for name, module in self._dense.writers.items():
                    hook = module.register_forward_hook(self._continue_stream(name))
                    stack.callback(hook.remove)
            yield

    def _pass(self, call: Call, run: Callable[[], Any]) -> _Pass:
        self._now = _Pass()
        self._stream = stream_input(call.args, call.kwargs)
        with suppress(_AllSeen):
            run()
        return self._now

    def _pass_dense(self, index: int, dense: DensePath) -> _Pass:
        visit, stop_early = self._visit, self._stop_early
        call = visit.dense_calls[index]
        with dense.weights():
            if not dense.leave:
                return self._pass(call, partial(visit.run, visit.block, call))
            self._stop_early = False
            found = self._pass(call, partial(visit.leave_dense, index))
            self._stop_early = stop_early
            return found

    def _enter(self, experts: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before experts run: keep what is chosen; send all tokens through if that is wanted."""
        assert isinstance(experts, SparseExperts)
        call = signature(experts.forward).bind(*args, **kwargs).arguments
        self._choices[experts] = call["top_k_index"]
        if not self._everywhere:
            return
        inside = {index for owner, index in self._experts.values() if owner is experts}
        rows = self._tokens(experts, call["hidden_states"])
        self._beside = True
        try:
            for index in sorted(inside):
                experts.compute(index, rows)
        finally:
            self._beside = False

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name, x, now = self._names[module], args[0], self._now
        if module in self._experts and self._everywhere != self._beside:
            return
        routed = None if self._everywhere else self._routed(module)
        if routed is not None:
            if not len(routed.tokens):
                return  # padding alone
            now.routed.setdefault(name, []).append(routed.tokens)
        axes = Axes.of(module)
        seen = id(x), axes.spatial
        if seen not in now.by_tensor:
            if self._beside:
                rows = x.detach()  # no padding among them
            elif routed is None:
                rows = self._tokens(module, axes.channels_last(x))
            else:
                rows = x.detach()[routed.rows]
            # A copy: the model may write into its activations before the pass is counted.
            now.by_tensor[seen] = x, rows.clone()
        now.inputs.setdefault(name, []).append(now.by_tensor[seen][1])
        if self._stream is not None and self._dense is not None and name in self._dense.writers:
            now.streams[name] = self._tokens(module, axes.channels_last(self._stream))
        if self._stop_early and now.calls() == len(self._names):
            raise _AllSeen

    def _count(self, own: _Pass, twin: _Pass | None) -> None:
        """Add a pass to the sums of the layers that it reached."""
        self._regroup(own)
        for group in self._groups:
            name = group.names[0]
            dense = twin.inputs.get(name, []) if twin is not None else []
            for index, rows in enumerate(own.inputs.get(name, ())):
                # Tokens that the dense model routes otherwise stand in for themselves.
                twins, there = rows, index < len(dense)
                if name in own.routed and twin is not None:
                    tokens = own.routed[name][index]
                    others = twin.routed[name][index] if there else tokens[:0]
                    same = torch.isin(tokens, others)
                    self._strays.update(dict.fromkeys(group.names, int((~same).sum())))
                    if there:
                        twins = rows.clone()
                        twins[same] = dense[index][torch.isin(others, tokens)]
                elif there and dense[index].shape == rows.shape:
                    twins = dense[index]
                group.collector.add(rows, twins)
        for name, stream in own.streams.items() if twin is not None else ():
            assert twin is not None
            assert self._dense is not None
            if name in twin.streams:
                missing = (twin.streams[name] - stream).float() / self._dense.factors[name]
                rows = own.inputs[name][-1].float()
                if name not in self._residuals:
                    self._residuals[name] = missing.new_zeros(missing.shape[1], rows.shape[1])
                with full_precision():
                    self._residuals[name].addmm_(missing.T, rows)

    def _regroup(self, own: _Pass) -> None:
        """Layers that no longer have the same inputs part, each with the sums so far."""
        groups: list[_Group] = []
        known: set[str] = set()
        for group in self._groups:
            known.update(group.names)
            parts = _by_inputs(group.names, own)
            copies = [deepcopy(group.collector) for _ in parts[1:]]
            groups += map(_Group, parts, [group.collector, *copies])
        for part in _by_inputs([n for n in own.inputs if n not in known], own):
            rows = own.inputs[part[0]][0]
            batches, cross = len(self._visit.calls), self._dense is not None
            groups.append(
                _Group(
                    part,
                    StatisticsCollector(rows.shape[1], self._needs, batches, rows.device, cross),
                )
            )
        self._groups = groups

    def _continue_stream(self, name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            assert self._stream is not None
            assert self._dense is not None
            self._stream = self._stream + self._dense.factors[name] * output

        return add

    def _routed(self, module: nn.Module) -> _Routed | None:
        if module not in self._experts:
            return None
        experts, index = self._experts[module]
        choice = self._choices[experts]
        tokens = chosen_slots(choice, index) // choice.shape[1]
        inside = torch.ones_like(tokens, dtype=torch.bool)
        mask = self._padding.tokens(experts, len(choice))
        if mask is not None:
            inside = mask.to(tokens.device)[tokens]
        return _Routed(inside, tokens[inside])

    def _tokens(self, module: nn.Module, x: Tensor) -> Tensor:
        """The rows of a module's input that are no padding, (tokens, in)."""
        rows = x.detach().reshape(-1, x.shape[-1])
        mask = self._padding.tokens(module, len(rows))
        return rows if mask is None else rows[mask.to(rows.device)]


def _by_inputs(names: list[str], own: _Pass) -> list[list[str]]:
    """Split layers by what they were handed in a pass."""
    parts: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        parts.setdefault(tuple(id(x) for x in own.inputs.get(name, ())), []).append(name)
    return list(parts.values())
