"""Forward passes of a model, one per batch, each a coroutine that stops in front of blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import greenlet

from ..layers.blocks import Block
from .batches import Batch
from .offload import Parked
from .padding import Padding


@dataclass(frozen=True)
class Call:
    """One batch's call of a block; `batch` is the batch's number."""

    batch: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    padding: Padding
    parked: Parked


class Passes:
    """Each pass stands in front of a block, or is at its end; as a context, they are unwound.

    Args:
        forward: one pass over the batch of a number; it calls `wait` in front of a block.
        batches: what the passes are over.
    """

    def __init__(self, forward: Callable[[int], None], batches: Sequence[Batch]) -> None:
        self._passes = [greenlet.greenlet(forward) for _ in batches]
        self._stops: list[tuple[Block, Call] | None] = []

    def __enter__(self) -> None:
        """Run every pass to its first block."""
        try:
            self._stops = [running.switch(index) for index, running in enumerate(self._passes)]
        except BaseException:
            self.__exit__()
            raise

    def blocks(self) -> list[Block]:
        """Where the passes stand."""
        return [stop[0] for stop in self._stops if stop]

    def calls(self, block: Block) -> tuple[Call, ...]:
        """Of the passes that stand in front of a block."""
        return tuple(stop[1] for stop in self._stops if stop and stop[0] is block)

    def go_on(self, batch: int) -> None:
        """Through the block that a pass stands in front of to the next one that waits."""
        self._stops[batch] = self._passes[batch].switch()

    def __exit__(self, *error: object) -> None:
        """Unwind the passes that are under way."""
        for running in self._passes:
            if running:
                running.throw(greenlet.GreenletExit)


def wait(block: Block, call: Call) -> None:
    """Called within a pass: hand its call of a block over, and stand there until `go_on`."""
    call.parked.away()
    parent = greenlet.getcurrent().parent
    assert parent is not None
    parent.switch((block, call))
    call.parked.back()
