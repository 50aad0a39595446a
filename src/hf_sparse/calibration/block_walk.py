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
blocks, that is the hidden states. Those of waiting batches are moved from an accelerator to the
CPU, or to files, see `activations`.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core.errors import CalibrationError
from ..core.storages import storages
from ..layers.blocks import Block
from .activations import Activations, Pass
from .batches import Batch
from .forward import call_model, plain_outputs
from .hooks import hooked
from .padding import Padding
from .passes import Call, Passes, wait
from .survey import Survey


@dataclass(frozen=True)
class Visit:
    """All batches stand in front of a block.

    Attributes:
        block: that block.
        calls: of the block, one or more a batch.
        run: runs the block as it is now on one call.
        dense_calls: the same batches' calls in the dense model, if the walk carries it along.
        leave_dense: lets the dense model's pass of one of `dense_calls` go on through the block as
            it is now, to the next if there is one: call it once for each, while the block is dense.
            The call is gone then.
        leave: lets all passes go on through the block as it is now; the calls are gone then. What
            asks for the next visit does the same.
    """

    block: Block
    calls: tuple[Call, ...]
    run: Callable[[Block, Call], Any]
    dense_calls: tuple[Call, ...]
    leave_dense: Callable[[Call], None]
    leave: Callable[[], None]


class BlockWalk:
    """Iterates over the visits of a model's blocks, in the order in which the model calls them.

    Args:
        model: in eval mode; its hooks (accelerate's offloading) stay in force.
        blocks: from `find_blocks`.
        batches: model inputs, on the CPU.
        carry_dense: run a second pass per batch, through the blocks as they were. It takes the
            memory of one more set of hidden states.
        activations: where the passes' hidden states wait, and which blocks a run before has
            finished: those have no visit. None to hold all in memory.

    The caller prunes a visit's block before asking for the next visit, and closes the iterator
    (`contextlib.closing`) to unwind the passes that are under way and remove all hooks, also after
    an exception. Blocks that the model never calls on these batches have no visit.

    Raises:
        CalibrationError: the model can't be run on a batch; or `carry_dense`, and a block is called
            several times in a pass, or reached by other batches in the dense model; or outputs are
            to be kept, and a block is called several times.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Batch],
        carry_dense: bool = False,
        activations: Activations | None = None,
    ) -> None:
        self._model, self._blocks, self._batches = model, blocks, batches
        self._carry_dense = carry_dense
        self._activations = activations or Activations()
        self._waiting: dict[nn.Module, Block] = {}
        self._left: Block | None = None
        self._paddings: list[Padding] = []
        self._pass_of: dict[greenlet.greenlet, Pass] = {}
        self._met: dict[Pass, list[weakref.ref[Tensor]]] = {}
        self._running_block = False
        self._scouted: tuple[nn.Module, list[Call]] | None = None
        own = itertools.chain(model.parameters(), model.buffers(), *(b.values() for b in batches))
        self._own = frozenset(storages(own))

    def __iter__(self) -> Generator[Visit]:
        with torch.no_grad(), plain_outputs(self._model):
            survey = Survey.of(self._model, self._blocks, self._batches)
            if self._carry_dense or self._activations.keeps:
                _check_followable(survey, self._activations.keeps)
            self._paddings = [Padding.of(batch, survey.told) for batch in self._batches]
            finished = [b for b in survey.blocks if b.name in self._activations.finished]
            waiting = [b for b in survey.blocks if b.name not in self._activations.finished]
            self._waiting = {block.module: block for block in waiting}
            if not waiting:
                return
            passes = Passes(partial(self._forward, False), self._batches)
            dense = Passes(partial(self._forward, True), self._batches if self._carry_dense else ())
            stops = (
                module.register_forward_pre_hook(self._stop, prepend=True, with_kwargs=True)
                for module in self._waiting
            )
            ends = (module.register_forward_hook(self._keep) for module in self._waiting)
            hooks = hooked(itertools.chain(stops, ends) if self._activations.keeps else stops)
            with self._replayed(finished), hooks, passes, dense:
                yield from self._visits(survey, passes, dense)

    def _visits(self, survey: Survey, passes: Passes, dense: Passes) -> Generator[Visit]:
        order = {block.name: place for place, block in enumerate(survey.blocks)}
        while self._waiting and (reached := passes.blocks()):
            block = min(reached, key=lambda block: order[block.name])
            stopped = [call.batch for call in passes.calls(block)]
            # Nothing here holds the visit: its calls must not wait for the next block's.
            yield self._visit(survey, block, passes, dense)
            self._leave(passes, block, stopped)

    def _visit(self, survey: Survey, block: Block, passes: Passes, dense: Passes) -> Visit:
        calls, dense_calls = passes.calls(block), dense.calls(block)
        stopped = [call.batch for call in calls]
        if self._carry_dense and stopped != [call.batch for call in dense_calls]:
            raise CalibrationError(
                f"{block.name} is reached by other batches in the dense than in the pruned "
                "model: target='dense' can't compare them; pass target='layer'"
            )
        if block.module in survey.repeated:
            calls = tuple(call for batch in stopped for call in self._scout(block, batch))
        del self._waiting[block.module]
        self._left = block
        leave_dense = partial(self._leave_dense, dense, block)
        leave = partial(self._leave, passes, block, stopped)
        return Visit(block, calls, self._run, dense_calls, leave_dense, leave)

    def _leave(self, passes: Passes, block: Block, stopped: Sequence[int]) -> None:
        """Let passes go on through a block, unless they have."""
        if self._left is block and self._waiting:
            for batch in stopped:
                passes.go_on(batch)
        self._left = None

    def _forward(self, dense: bool, batch: int) -> None:
        """One forward pass of the whole model; the body of a batch's coroutine."""
        self._pass_of[greenlet.getcurrent()] = batch, dense
        call_model(self._model, self._batches[batch])

    def _scout(self, block: Block, batch: int) -> list[Call]:
        """All calls of a block in one more pass over a batch, with what is pruned by now."""
        calls: list[Call] = []
        self._scouted = block.module, calls
        try:
            self._forward(False, batch)
        finally:
            self._scouted = None
        return calls

    def _stop(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Where a pass reaches a block that isn't pruned yet: hand its inputs over and wait."""
        if self._running_block or module not in self._waiting:
            return
        running = self._pass_of[greenlet.getcurrent()]
        batch = running[0]
        padding = self._paddings[batch].in_call(module, args, kwargs)
        if self._scouted is None:
            block = self._waiting[module]
            self._activations.arrive(running, block.name, (args, kwargs))
            # What blocks before were handed may live on in the model's frames.
            met = self._met.get(running, [])
            parked = self._activations.parked((args, kwargs, [ref() for ref in met]), self._own)
            new = [weakref.ref(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self._met[running] = [ref for ref in met if ref() is not None] + new
            wait(block, Call(batch, args, kwargs, padding, parked))
        elif module is self._scouted[0]:  # the pass goes on, and may write into its tensors
            args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
            parked = self._activations.parked((), self._own)
            self._scouted[1].append(Call(batch, args, kwargs, padding, parked))

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Where a pass comes out of a block that it leaves: a later run needs what it made."""
        running = self._pass_of.get(greenlet.getcurrent())
        if running and self._left and module is self._left.module and not self._running_block:
            self._activations.leave(running, self._left.name, output)

    @contextmanager
    def _replayed(self, finished: Sequence[Block]) -> Iterator[None]:
        """While this lasts blocks that a run before has finished hand out what they made then."""

        def replay(name: str, *args: Any, **kwargs: Any) -> Any:
            return self._activations.replay(self._pass_of[greenlet.getcurrent()], name)

        before = [(block.module, vars(block.module).get("forward")) for block in finished]
        try:
            for block in finished:
                block.module.forward = partial(replay, block.name)
            yield
        finally:
            for module, forward in before:
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    module.forward = forward

    def _run(self, block: Block, call: Call) -> Any:
        call.parked.back()
        self._running_block = True
        try:
            args = map(_own_cache, call.args)
            return block.module(*args, **{k: _own_cache(v) for k, v in call.kwargs.items()})
        finally:
            self._running_block = False
            call.parked.away()

    def _leave_dense(self, dense: Passes, block: Block, call: Call) -> None:
        if self._waiting:
            dense.go_on(call.batch)
        else:  # nothing after the last block is of use, the head least of all
            self._run(block, call)


def _check_followable(survey: Survey, keeps: bool) -> None:
    """Raise a CalibrationError if a pass may not come through each block once, and by itself."""
    nested = {inner for b in survey.blocks for inner in b.module.modules() if inner is not b.module}
    shared = survey.repeated | nested
    for block in survey.blocks:
        if block.module in shared:
            what = f"{block.name} is called several times in one pass, or by several blocks: "
            raise CalibrationError(
                f"{what}a run over it can't be kept and resumed; prune it in memory"
                if keeps
                else f"{what}target='dense' can't be followed through it; pass target='layer'"
            )


def _own_cache(value: Any) -> Any:
    """A copy of a key-value cache, where a model makes one although told not to."""
    return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value
