"""Walking a model block by block while each block's inputs are at hand.

A block is what is pruned at once: a block (an element of the model's layer lists), or a single
layer that lies outside every block. The outputs of a pruned block must feed the next one, and
what a model does between two blocks (masks, position embeddings, cross-attention inputs, scaling)
is its own business. So the model itself drives the walk: one forward pass per batch is started
as a coroutine (a greenlet) that stops in front of every block. When all batches have stopped,
their inputs to the block are known exactly as the model passes them; the block can be run on them
as often as needed and pruned, and then the coroutines go on through the pruned block to the next.

A block that a pass calls more than once (layers shared over the depth) is pruned at its first call,
for all of them: a scout, a pass of its own from the model's start, records the others' inputs.

Live at any time: one block's work and, per batch, what the model's forward pass holds between two
blocks, that is the hidden states. On an accelerator those of waiting batches are moved to the CPU.
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

from ..core.errors import CalibrationError
from ..layers import SparseExperts
from ..layers.blocks import Block
from .batches import Batch
from .forward import call_model, without_cache
from .offload import Parked
from .padding import Padding, mask_owners
from .towers import missing_input


@dataclass(frozen=True)
class Call:
    """One batch's call of a block."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    padding: Padding
    parked: Parked


@dataclass(frozen=True)
class Visit:
    """All batches stand in front of a block."""

    block: Block
    calls: tuple[Call, ...]
    run: Callable[[Block, Call], Any]
    """Runs the block as it is now on one call."""
    dense_calls: tuple[Call, ...] = ()
    """The same batches' calls in the dense model, if the walk carries it along."""
    leave_dense: Callable[[int], None] = lambda index: None
    """Lets the dense model's pass of one batch go on through the block as it is now, to the next if
    there is one: call it once for each of `dense_calls`, which is gone then, while the block is
    dense."""


class BlockWalk:
    """Iterates over the visits of a model's blocks, in the order in which the model calls them.

    Args:
        model: in eval mode; its hooks (accelerate's offloading) stay in force.
        blocks: from `find_blocks`.
        batches: model inputs, on the CPU.
        carry_dense: run a second pass per batch, through the blocks as they were. It takes the
            memory of one more set of hidden states.

    The caller prunes a visit's block before asking for the next visit. Leaving the loop, also by
    an exception, unwinds the passes that are under way and removes all hooks. Units that the model
    never calls on these batches have no visit.

    Raises:
        CalibrationError: the model can't be run on a batch, a tower lacks its input, or a block is
            reached by other batches in the dense model.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Batch],
        carry_dense: bool = False,
    ) -> None:
        self._model = model
        self._carry_dense = carry_dense
        self._batches = batches
        self._waiting = {block.module: block for block in blocks}
        self._order: dict[str, int] = {}
        self._running_block = False
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
                while self._waiting and (block := self._next_block(passes.stops)):
                    here, twins = passes.at(block), dense.at(block)
                    if self._carry_dense:
                        _check_dense(block, block.module in repeated, here == twins)
                    calls = [passes.call(i) for i in here]
                    if block.module in repeated:
                        calls = [c for i in here for c in self._scout(block, self._batches[i])]
                    del self._waiting[block.module]
                    dense_calls = tuple(dense.call(i) for i in twins)

                    def leave_dense(
                        index: int,
                        block: Block = block,
                        twins: Sequence[int] = twins,
                        calls: Sequence[Call] = dense_calls,
                    ) -> None:
                        if self._waiting:
                            dense.go_on(twins[index])
                        else:  # nothing after the last block is of use, the head least of all
                            self._run(block, calls[index])

                    yield Visit(block, tuple(calls), self._run, dense_calls, leave_dense)
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
        call as a module, but by its `forward`, in the block's place. Returns the blocks' modules
        that a pass calls more than once.

        Raises a CalibrationError if a tower is never called for lack of its input.
        """
        layers = {
            target: self._model.get_submodule(target)
            for block in self._waiting.values()
            for target in block.targets
        }
        experts = [m for m in self._model.modules() if isinstance(m, SparseExperts)]
        most: Counter[nn.Module] = Counter()
        counts: Counter[nn.Module] = Counter()
        hooks = [
            module.register_forward_pre_hook(lambda m, _: counts.update([m]))
            for module in {*self._waiting, *layers.values()}
        ]
        self._running_block = True
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
            self._running_block = False
            for hook in hooks:
                hook.remove()
        blocks = [
            part for block in self._waiting.values() for part in _callable(block, layers, most)
        ]
        self._waiting = {block.module: block for block in blocks}
        self._order = {block.name: i for i, block in enumerate(blocks)}
        given = {key for batch in self._batches for key in batch}
        for module, block in self._waiting.items():
            missing = None if most[module] else missing_input(self._model, block.name, given)
            if missing:
                raise CalibrationError(
                    f"no calibration token reached {block.name}: {missing}, the data have "
                    f"{', '.join(sorted(given))}. Pass dicts of all inputs, or leave the tower "
                    "dense with modules_to_not_convert"
                )
        return {module for module in self._waiting if most[module] > 1}

    def _scout(self, block: Block, batch: Batch) -> list[Call]:
        """All calls of a block in one more pass over a batch, with what is pruned by now."""
        calls: list[Call] = []
        self._scouted = block.module, calls
        try:
            self._forward(batch)
        finally:
            self._scouted = None
        return calls

    def _stop(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Where a pass reaches a block that isn't pruned yet: hand its inputs over and wait."""
        if self._running_block or module not in self._waiting:
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

    def _run(self, block: Block, call: Call) -> Any:
        call.parked.back()
        self._running_block = True
        try:
            args = map(_own_cache, call.args)
            return block.module(*args, **{k: _own_cache(v) for k, v in call.kwargs.items()})
        finally:
            self._running_block = False
            call.parked.away()

    def _next_block(self, stops: Sequence[tuple[Block, Call] | None]) -> Block | None:
        reached = [stop[0] for stop in stops if stop]
        return min(reached, key=lambda block: self._order[block.name], default=None)


def _callable(
    block: Block, layers: Mapping[str, nn.Module], called: Counter[nn.Module]
) -> Iterator[Block]:
    """The block, or its layers if only they are called."""
    parts = [Block(name, layers[name], (name,)) for name in block.targets]
    if called[block.module] or not any(called[part.module] for part in parts):
        yield block
    else:
        yield from parts


def _check_dense(block: Block, repeated: bool, same_batches: bool) -> None:
    """Raise a CalibrationError if the dense model's passes can't be compared in a block."""
    if repeated:
        raise CalibrationError(
            f"{block.name} is called several times in one pass: target='dense' can't be followed "
            "through it; pass target='layer'"
        )
    if not same_batches:
        raise CalibrationError(
            f"{block.name} is reached by other batches in the dense than in the pruned model: "
            "target='dense' can't compare them; pass target='layer'"
        )


def _own_cache(value: Any) -> Any:
    """A copy of a key-value cache, where a model makes one although told not to."""
    return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value


class _Passes:
    """One forward pass of the model per batch, each standing in front of a block or at its end."""

    def __init__(self, forward: Callable[[Batch], None], batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._passes = [greenlet.greenlet(forward) for _ in batches]
        self.stops: list[tuple[Block, Call] | None] = []

    def start(self) -> None:
        pairs = zip(self._passes, self._batches, strict=True)
        self.stops = [running.switch(batch) for running, batch in pairs]

    def at(self, block: Block) -> list[int]:
        """The passes that stand in front of a block."""
        return [i for i, stop in enumerate(self.stops) if stop and stop[0] is block]

    def call(self, index: int) -> Call:
        stop = self.stops[index]
        assert stop is not None
        return stop[1]

    def go_on(self, index: int) -> None:
        """Through the block that a pass stands in front of to the next one that waits."""
        self.stops[index] = self._passes[index].switch()

    def stop(self) -> None:
        for running in self._passes:
            if running:
                running.throw(greenlet.GreenletExit)
