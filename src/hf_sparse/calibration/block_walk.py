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
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..core.errors import CalibrationError
from ..layers.blocks import Block
from .batches import Batch
from .forward import call_model, plain_outputs
from .hooks import hooked
from .offload import Parked
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
    """

    block: Block
    calls: tuple[Call, ...]
    run: Callable[[Block, Call], Any]
    dense_calls: tuple[Call, ...]
    leave_dense: Callable[[Call], None]


class BlockWalk:
    """Iterates over the visits of a model's blocks, in the order in which the model calls them.

    Args:
        model: in eval mode; its hooks (accelerate's offloading) stay in force.
        blocks: from `find_blocks`.
        batches: model inputs, on the CPU.
        carry_dense: run a second pass per batch, through the blocks as they were. It takes the
            memory of one more set of hidden states.

    The caller prunes a visit's block before asking for the next visit, and closes the iterator
    (`contextlib.closing`) to unwind the passes that are under way and remove all hooks, also after
    an exception. Blocks that the model never calls on these batches have no visit.

    Raises:
        CalibrationError: the model can't be run on a batch; or `carry_dense`, and a block is called
            several times in a pass, or reached by other batches in the dense model.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Batch],
        carry_dense: bool = False,
    ) -> None:
        self._model, self._blocks, self._batches = model, blocks, batches
        self._carry_dense = carry_dense
        self._waiting: dict[nn.Module, Block] = {}
        self._paddings: list[Padding] = []
        self._batch_of: dict[greenlet.greenlet, int] = {}
        self._running_block = False
        self._scouted: tuple[nn.Module, list[Call]] | None = None
        own = itertools.chain(model.parameters(), model.buffers())
        self._own = frozenset(t.untyped_storage().data_ptr() for t in own)

    def __iter__(self) -> Generator[Visit]:
        with torch.no_grad(), plain_outputs(self._model):
            survey = Survey.of(self._model, self._blocks, self._batches)
            if self._carry_dense:
                _check_followable(survey)
            self._paddings = [Padding.of(batch, survey.told) for batch in self._batches]
            self._waiting = {block.module: block for block in survey.blocks}
            passes = Passes(self._forward, self._batches)
            dense = Passes(self._forward, self._batches if self._carry_dense else ())
            hooks = (
                module.register_forward_pre_hook(self._stop, prepend=True, with_kwargs=True)
                for module in self._waiting
            )
            with hooked(hooks), passes, dense:
                yield from self._visits(survey, passes, dense)

    def _visits(self, survey: Survey, passes: Passes, dense: Passes) -> Generator[Visit]:
        order = {block.name: place for place, block in enumerate(survey.blocks)}
        while self._waiting and (reached := passes.blocks()):
            block = min(reached, key=lambda block: order[block.name])
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
            leave_dense = partial(self._leave_dense, dense, block)
            yield Visit(block, calls, self._run, dense_calls, leave_dense)
            del calls, dense_calls, leave_dense  # they must not wait for the next block's
            if self._waiting:
                for batch in stopped:
                    passes.go_on(batch)

    def _forward(self, batch: int) -> None:
        """One forward pass of the whole model; the body of a batch's coroutine."""
        self._batch_of[greenlet.getcurrent()] = batch
        call_model(self._model, self._batches[batch])

    def _scout(self, block: Block, batch: int) -> list[Call]:
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
        batch = self._batch_of[greenlet.getcurrent()]
        padding = self._paddings[batch].in_call(module, args, kwargs)
        if self._scouted is None:
            parked = Parked((args, kwargs), self._own)
            wait(self._waiting[module], Call(batch, args, kwargs, padding, parked))
        elif module is self._scouted[0]:  # the pass goes on, and may write into its tensors
            args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
            self._scouted[1].append(Call(batch, args, kwargs, padding, Parked((), self._own)))

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


def _check_followable(survey: Survey) -> None:
    """Raise a CalibrationError if the dense model's passes can't be compared in a block."""
    nested = {inner for b in survey.blocks for inner in b.module.modules() if inner is not b.module}
    shared = survey.repeated | nested
    for block in survey.blocks:
        if block.module in shared:
            raise CalibrationError(
                f"{block.name} is called several times in one pass, or by several blocks: "
                "target='dense' can't be followed through it; pass target='layer'"
            )


def _own_cache(value: Any) -> Any:
    """A copy of a key-value cache, where a model makes one although told not to."""
    return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value
