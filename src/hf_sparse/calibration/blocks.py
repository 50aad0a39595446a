"""Walking a model block by block while each block's inputs are at hand.

A unit is what is pruned at once: a block (an element of the model's layer lists), or a single
layer that lies outside every block. The outputs of a pruned unit must feed the next one, and
what a model does between two units (masks, position embeddings, cross-attention inputs, scaling)
is its own business. So the model itself drives the walk: one forward pass per batch is started
as a coroutine (a greenlet) that stops in front of every unit. When all batches have stopped,
their inputs to the unit are known exactly as the model passes them; the unit can be run on them
as often as needed and pruned, and then the coroutines go on through the pruned unit to the next.

A unit that a pass calls more than once (layers shared over the depth) is pruned at its first call,
for all of them: a scout, a pass of its own from the model's start, records the others' inputs.

Live at any time: one unit's work and, per batch, what the model's forward pass holds between two
units, that is the hidden states. On an accelerator those of waiting batches are moved to the CPU.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from ..errors import CalibrationError
from ..layers import SparseExperts
from .data import Batch
from .forward import call_model, without_cache
from .offload import Parked
from .padding import Padding, mask_owners
from .towers import missing_input
from .units import Unit


@dataclass(frozen=True)
class Call:
    """One batch's call of a unit."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    padding: Padding
    parked: Parked


@dataclass(frozen=True)
class Visit:
    """All batches stand in front of a unit."""

    unit: Unit
    calls: tuple[Call, ...]
    run: Callable[[Unit, Call], Any]
    """Runs the unit as it is now on one call."""
    dense_calls: tuple[Call, ...] = ()
    """The same batches' calls in the dense model, if the walk carries it along."""
    leave_dense: Callable[[int], None] = lambda index: None
    """Lets the dense model's pass of one batch go on through the unit as it is now, to the next if
    there is one: call it once for each of `dense_calls`, which is gone then, while the unit is
    dense."""


class BlockWalk:
    """Iterates over the visits of a model's units, in the order in which the model calls them.

    Args:
        model: in eval mode; its hooks (accelerate's offloading) stay in force.
        units: from `find_units`.
        batches: model inputs, on the CPU.
        carry_dense: run a second pass per batch, through the units as they were. It takes the
            memory of one more set of hidden states.

    The caller prunes a visit's unit before asking for the next visit. Leaving the loop, also by
    an exception, unwinds the passes that are under way and removes all hooks. Units that the model
    never calls on these batches have no visit.

    Raises:
        CalibrationError: the model can't be run on a batch, a tower lacks its input, or a unit is
            reached by other batches in the dense model.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        batches: Sequence[Batch],
        carry_dense: bool = False,
    ) -> None:
        self._model = model
        self._carry_dense = carry_dense
        self._batches = batches
        self._waiting = {unit.module: unit for unit in units}
        self._order: dict[str, int] = {}
        self._running_unit = False
        self._scouted: tuple[nn.Module, list[Call]] | None = None
        self._padding: dict[greenlet.greenlet, Padding] = {}
        self._owners: Mapping[str, AbstractSet[nn.Module]] = {}
        own = itertools.chain(model.parameters(), model.buffers())
        self._own = frozenset(t.untyped_storage().data_ptr() for t in own)

    def __iter__(self) -> Iterator[Visit]:
        hooks: list[RemovableHandle] = []
        passes = _Passes(self._forward, self._batches)
        dense = _Passes(self._forward, self._batches if self._carry_dense else ())
        try:
            with torch.no_grad(), without_cache(self._model):
                repeated = self._survey()
                for module in self._waiting:
                    hook = module.register_forward_pre_hook(
                        self._stop, prepend=True, with_kwargs=True
                    )
                    hooks.append(hook)
                passes.start()
                dense.start()
                while self._waiting and (unit := self._next_unit(passes.stops)):
                    here, twins = passes.at(unit), dense.at(unit)
                    if self._carry_dense:
                        _check_dense(unit, unit.module in repeated, here == twins)
                    calls = [passes.call(i) for i in here]
                    if unit.module in repeated:
                        calls = [c for i in here for c in self._scout(unit, self._batches[i])]
                    del self._waiting[unit.module]
                    dense_calls = tuple(dense.call(i) for i in twins)

                    def leave_dense(
                        index: int,
                        unit: Unit = unit,
                        twins: Sequence[int] = twins,
                        calls: Sequence[Call] = dense_calls,
                    ) -> None:
                        if self._waiting:
                            dense.go_on(twins[index])
                        else:  # nothing after the last unit is of use, the head least of all
                            self._run(unit, calls[index])

                    yield Visit(unit, tuple(calls), self._run, dense_calls, leave_dense)
                    if self._waiting:
                        for i in here:
                            passes.go_on(i)
        finally:
            passes.stop()
            dense.stop()
            for hook in hooks:
                hook.remove()

    def _forward(self, batch: Batch) -> None:
        """One forward pass of the whole model; the body of a batch's coroutine."""
        self._padding[greenlet.getcurrent()] = Padding.of(batch, self._owners)
        call_model(self._model, batch)

    def _survey(self) -> set[nn.Module]:
        """Look at passes before any stops; one tells for all batches with equal keys.

        Finds out whose rows the masks are of, and puts the layers of a block that the model doesn't
        call as a module, but by its `forward`, in the block's place. Returns the units' modules
        that a pass calls more than once.

        Raises a CalibrationError if a tower is never called for lack of its input.
        """
        layers = {
            target: self._model.get_submodule(target)
            for unit in self._waiting.values()
            for target in unit.targets
        }
        experts = [m for m in self._model.modules() if isinstance(m, SparseExperts)]
        most: Counter[nn.Module] = Counter()
        counts: Counter[nn.Module] = Counter()
        hooks = [
            module.register_forward_pre_hook(lambda m, _: counts.update([m]))
            for module in {*self._waiting, *layers.values()}
        ]
        self._running_unit = True
        try:
            for batch in {frozenset(batch): batch for batch in self._batches}.values():
                self._forward(batch)
                most |= counts
                counts.clear()
            for hook in hooks:
                hook.remove()
            watched = [*layers.values(), *experts]
            self._owners = mask_owners(self._forward, self._batches, watched)
        finally:
            self._running_unit = False
            for hook in hooks:
                hook.remove()
        units = [part for unit in self._waiting.values() for part in _callable(unit, layers, most)]
        self._waiting = {unit.module: unit for unit in units}
        self._order = {unit.name: i for i, unit in enumerate(units)}
        given = {key for batch in self._batches for key in batch}
        for module, unit in self._waiting.items():
            missing = None if most[module] else missing_input(self._model, unit.name, given)
            if missing:
                raise CalibrationError(
                    f"no calibration token reached {unit.name}: {missing}, the data have "
                    f"{', '.join(sorted(given))}. Pass dicts of all inputs, or leave the tower "
                    "dense with modules_to_not_convert"
                )
        return {module for module in self._waiting if most[module] > 1}

    def _scout(self, unit: Unit, batch: Batch) -> list[Call]:
        """All calls of a unit in one more pass over a batch, with what is pruned by now."""
        calls: list[Call] = []
        self._scouted = unit.module, calls
        try:
            self._forward(batch)
        finally:
            self._scouted = None
        return calls

    def _stop(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Where a pass reaches a unit that isn't pruned yet: hand its inputs over and wait."""
        if self._running_unit or module not in self._waiting:
            return
        current = greenlet.getcurrent()
        padding = self._padding[current]
        if self._scouted is not None:
            if module is self._scouted[0]:  # the pass goes on, and may write into its tensors
                args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
                self._scouted[1].append(Call(args, kwargs, padding, Parked((), self._own)))
            return
        call = Call(args, kwargs, padding, Parked((args, kwargs), self._own))
        call.parked.away()
        assert current.parent is not None
        current.parent.switch((self._waiting[module], call))
        call.parked.back()

    def _run(self, unit: Unit, call: Call) -> Any:
        call.parked.back()
        self._running_unit = True
        try:
            args = map(_own_cache, call.args)
            return unit.module(*args, **{k: _own_cache(v) for k, v in call.kwargs.items()})
        finally:
            self._running_unit = False
            call.parked.away()

    def _next_unit(self, stops: Sequence[tuple[Unit, Call] | None]) -> Unit | None:
        reached = [stop[0] for stop in stops if stop]
        return min(reached, key=lambda unit: self._order[unit.name], default=None)


def _callable(
    unit: Unit, layers: Mapping[str, nn.Module], called: Counter[nn.Module]
) -> Iterator[Unit]:
    """The unit, or its layers if only they are called."""
    parts = [Unit(name, layers[name], (name,)) for name in unit.targets]
    if called[unit.module] or not any(called[part.module] for part in parts):
        yield unit
    else:
        yield from parts


def _check_dense(unit: Unit, repeated: bool, same_batches: bool) -> None:
    """Raise a CalibrationError if the dense model's passes can't be compared in a unit."""
    if repeated:
        raise CalibrationError(
            f"{unit.name} is called several times in one pass: target='dense' can't be followed "
            "through it; pass target='layer'"
        )
    if not same_batches:
        raise CalibrationError(
            f"{unit.name} is reached by other batches in the dense than in the pruned model: "
            "target='dense' can't compare them; pass target='layer'"
        )


def _own_cache(value: Any) -> Any:
    """A copy of a key-value cache, where a model makes one although told not to."""
    return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value


class _Passes:
    """One forward pass of the model per batch, each standing in front of a unit or at its end."""

    def __init__(self, forward: Callable[[Batch], None], batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._passes = [greenlet.greenlet(forward) for _ in batches]
        self.stops: list[tuple[Unit, Call] | None] = []

    def start(self) -> None:
        pairs = zip(self._passes, self._batches, strict=True)
        self.stops = [running.switch(batch) for running, batch in pairs]

    def at(self, unit: Unit) -> list[int]:
        """The passes that stand in front of a unit."""
        return [i for i, stop in enumerate(self.stops) if stop and stop[0] is unit]

    def call(self, index: int) -> Call:
        stop = self.stops[index]
        assert stop is not None
        return stop[1]

    def go_on(self, index: int) -> None:
        """Through the unit that a pass stands in front of to the next one that waits."""
        self.stops[index] = self._passes[index].switch()

    def stop(self) -> None:
        for running in self._passes:
            if running:
                running.throw(greenlet.GreenletExit)
