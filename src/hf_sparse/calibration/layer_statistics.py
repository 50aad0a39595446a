"""Statistics of a block's layers: the block runs on every batch, and what they are handed adds up.

Layers that are handed the very same tensor (q/k/v, gate/up) share one collector, for as long as
they are.

If the walk carries the dense model along, its pass of a batch comes first, so that the inputs of
the same tokens in the dense model are at hand when the pruned ones are counted. A token that the
dense model routes to another expert has no dense input there: its own stands in for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.errors import SolveError
from ..core.precision import full_precision
from ..core.statistics import Needs, Statistics
from .block_walk import Visit
from .expert_routing import ExpertRouting
from .layer_inputs import InputRecorder, LayerInputs
from .owners import Owners
from .residual_stream import ResidualStream
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


def collect_statistics(
    visit: Visit,
    layers: Mapping[str, nn.Module],
    needs: Needs,
    dense: DensePath | None = None,
    everywhere: bool = False,
    owners: Owners | None = None,
) -> dict[str, Observed]:
    """Run a visit's block on all calls and return what was seen of each layer, by name.

    A layer that no token reached is left out: it was never called, or with padding or no rows
    alone; the data lack what would use it, or the model reads its weight by itself.

    Args:
        visit: a block and the calls that stand in front of it.
        layers: the layers of the block to watch; inputs are (..., in), a convolution's have the
            channels where it has them.
        needs: what to collect.
        dense: also collect cross moments and residuals against the dense model.
        everywhere: the layers are experts' and are to see all tokens that enter the experts; the
            block's output is that of the routed ones all the same.
        owners: add up with other processes, which run their own calls: a layer's owner gets what
            was seen, the others its tokens alone. None for one process.

    Raises:
        SolveError: a layer saw NaN or infinite inputs; names the layer.
    """
    routing = ExpertRouting(visit.block.module, layers, everywhere)
    stream = ResidualStream(dense.writers, dense.factors) if dense else ResidualStream({}, {})
    recorder = InputRecorder(layers, routing, stream)
    sums = _LayerSums(needs, len(visit.calls) * (owners.processes.size if owners else 1), dense)
    # Offloading hooks need the end of a pass to put weights back.
    offloads = any(hasattr(m, "_hf_hook") for m in visit.block.module.modules())
    once = False  # is each layer called once in a pass? Nothing is to be seen after the last then
    with recorder.watching():
        for index, call in enumerate(visit.calls):
            theirs = None
            if dense is not None:
                theirs = _dense_inputs(recorder, visit, index, dense, once)
            own = recorder.record(call, partial(visit.run, visit.block, call), once)
            if index == 0:
                once = not offloads and all(len(own.rows.get(name, ())) == 1 for name in layers)
            sums.add(own, theirs)
    if owners and owners.processes.size > 1:
        sums.share(owners, layers)
    found = sums.finish()
    return {name: found[name] for name in layers if name in found}


def _dense_inputs(
    recorder: InputRecorder, visit: Visit, index: int, dense: DensePath, once: bool
) -> LayerInputs:
    """The inputs in the dense model's pass of the same batch."""
    call = visit.dense_calls[index]
    with dense.weights():
        if dense.leave:  # the pass must come through the block to its end
            return recorder.record(call, partial(visit.leave_dense, call))
        return recorder.record(call, partial(visit.run, visit.block, call), once)


@dataclass
class _Group:
    """Layers that have had the same inputs so far."""

    names: list[str]
    collector: StatisticsCollector


class _LayerSums:
    """What adds up over passes."""

    def __init__(self, needs: Needs, batches: int, dense: DensePath | None) -> None:
        self._needs, self._batches, self._dense = needs, batches, dense
        self._groups: list[_Group] = []
        self._residuals: dict[str, Tensor] = {}
        self._strays: Counter[str] = Counter()  # tokens without a dense input

    def add(self, own: LayerInputs, dense: LayerInputs | None) -> None:
        """Count a pass, and the dense model's over the same batch."""
        self._regroup(own)
        for group in self._groups:
            for index, rows in enumerate(own.rows.get(group.names[0], ())):
                beside = None if dense is None else self._paired(group, index, own, dense)
                group.collector.add(rows, beside)
        if dense is not None:
            self._add_residuals(own, dense)

    def share(self, owners: Owners, layers: Mapping[str, nn.Module]) -> None:
        """Add up with the other processes, whose layers may have been called otherwise."""
        processes = owners.processes
        own = [(g.names, g.collector.tokens, g.collector.sampled) for g in self._groups]
        shapes = {name: tuple(residual.shape) for name, residual in self._residuals.items()}
        columns = {name: g.collector.columns for g in self._groups for name in g.names}
        told = processes.gather((own, shapes, columns, self._strays))
        columns = {name: width for _, _, theirs, _ in told for name, width in theirs.items()}
        places = [{n: i for i, (names, *_) in enumerate(of) for n in names} for of, *_ in told]
        parts: dict[tuple[int | None, ...], list[str]] = {}
        for name in layers:
            if name in columns:
                parts.setdefault(tuple(place.get(name) for place in places), []).append(name)
        owners.assign(parts.values(), layers)
        uses = Counter(place[processes.rank] for place in parts)
        groups = []
        for place, names in parts.items():
            index = place[processes.rank]
            if index is None:  # not called here
                collector = self._collector(columns[names[0]], _device(layers[names[0]]))
            else:
                collector = self._groups[index].collector
                collector = collector if uses[index] == 1 else deepcopy(collector)
            counts = [t[0][i] for t, i in zip(told, place, strict=True) if i is not None]
            kept = [0 if i is None else t[0][i][2] for t, i in zip(told, place, strict=True)]
            collector.share(processes, owners.of(names), sum(c[1] for c in counts), kept)
            groups.append(_Group(names, collector))
        self._groups, self._strays = groups, sum((t[3] for t in told), Counter())
        for name, shape in {n: s for t in told for n, s in t[1].items()}.items():
            residual = self._residuals.pop(name, None)
            if residual is None:
                residual = torch.zeros(shape, device=_device(layers[name]))
            processes.sum(residual, owners[name])
            if owners.is_own(name):
                self._residuals[name] = residual

    def finish(self) -> dict[str, Observed]:
        """Of every layer that a token reached."""
        observed = {}
        for group in self._groups:
            if not group.collector.tokens:
                continue
            try:
                statistics = group.collector.finish()
            except SolveError as error:
                raise SolveError(f"layer {group.names[0]}: {error}") from None
            for name in group.names:
                residual = self._residuals.get(name)
                if residual is not None:
                    residual = residual / statistics.tokens
                observed[name] = Observed(statistics, residual, self._note(name))
        return observed

    def _note(self, name: str) -> str | None:
        strays = self._strays[name]
        if not strays:
            return None
        return f"the dense model sends {strays} of its tokens elsewhere: its own outputs stay there"

    def _paired(self, group: _Group, index: int, own: LayerInputs, dense: LayerInputs) -> Tensor:
        """The dense model's inputs of the tokens that a group has had at its call `index`."""
        name = group.names[0]
        rows, theirs = own.rows[name][index], dense.rows.get(name, [])
        there = index < len(theirs)
        if name not in own.tokens:
            return theirs[index] if there and theirs[index].shape == rows.shape else rows
        tokens = own.tokens[name][index]
        others = dense.tokens[name][index] if there else tokens[:0]
        same = torch.isin(tokens, others)
        self._strays.update(dict.fromkeys(group.names, int((~same).sum())))
        if not there:
            return rows
        paired = rows.clone()
        paired[same] = theirs[index][torch.isin(others, tokens)]
        return paired

    def _add_residuals(self, own: LayerInputs, dense: LayerInputs) -> None:
        assert self._dense is not None
        for name, stream in own.streams.items():
            if name not in dense.streams:
                continue
            missing = (dense.streams[name] - stream).float() / self._dense.factors[name]
            rows = own.rows[name][-1].float()
            if name not in self._residuals:
                self._residuals[name] = missing.new_zeros(missing.shape[1], rows.shape[1])
            with full_precision():
                self._residuals[name].addmm_(missing.T, rows)

    def _regroup(self, own: LayerInputs) -> None:
        """Layers that no longer have the same inputs part, each with the sums so far."""
        groups: list[_Group] = []
        known: set[str] = set()
        for group in self._groups:
            known.update(group.names)
            parts = own.groups(group.names)
            copies = [deepcopy(group.collector) for _ in parts[1:]]
            groups += map(_Group, parts, [group.collector, *copies])
        for part in own.groups([name for name in own.rows if name not in known]):
            rows = own.rows[part[0]][0]
            groups.append(_Group(part, self._collector(rows.shape[1], rows.device)))
        self._groups = groups

    def _collector(self, columns: int, device: torch.device) -> StatisticsCollector:
        cross = self._dense is not None
        return StatisticsCollector(columns, self._needs, self._batches, device, cross)


def _device(layer: nn.Module) -> torch.device:
    """Where a layer's inputs are, as far as it tells."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return torch.device("cpu") if weight.is_meta else weight.device
