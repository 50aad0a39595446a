"""How far a run is, by the work that is left: calls of blocks, and layers to solve.

Each kind of work takes as long for its amount as it has so far, and each block as many calls as the
one before. From the second block on both are known.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..calibration.hooks import hooked
from ..core.duration import duration
from ..core.logging import has_terminal, progress_bar, shows_progress
from ..layers.blocks import Block
from .report import LayerReport

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
WHOLE = 100.0


@dataclass
class _Work:
    """Of one kind: what is left and done of it, and the seconds that it took."""

    left: float
    done: float = 0.0
    seconds: float = 0.0

    def take(self, amount: float, seconds: float) -> None:
        self.left, self.done = max(0.0, self.left - amount), self.done + amount
        self.seconds += seconds


class WorkBar:
    """A bar with the time that is left, or a line a block where there is no terminal.

    Args:
        blocks: that are left to prune.
        total: blocks of the model.
        costs: of solving each layer, in any unit, by name.
        batches: that each block is called with.
        shown: False where another process shows it.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        total: int,
        costs: Mapping[str, float],
        batches: int,
        shown: bool = True,
    ) -> None:
        self._blocks, self._total, self._costs = {b.name: b for b in blocks}, total, costs
        self._sizes = {b.name: sum(p.numel() for p in b.module.parameters()) for b in blocks}
        self._batches, self._shown = batches, shown
        self._lines = False
        self._run, self._solve = _Work(0.0), _Work(0.0)
        self._calls, self._usual = 0, 2 * batches  # for the statistics, and on to the next block
        self._set_left()
        self._began = self._clock = time.perf_counter()
        self._bar: Any = None
        self._percent = 0.0

    @property
    def seconds_left(self) -> float | None:
        """What the rest will take; None as long as nothing tells it."""
        kinds = self._run, self._solve
        if any(work.left and not work.done for work in kinds):
            return None
        return sum(work.left * work.seconds / work.done for work in kinds if work.done)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts calls of the blocks are counted, and it is shown."""
        lines = not has_terminal()
        self._lines = self._shown and lines and shows_progress()
        with ExitStack() as stack:
            handles = [
                b.module.register_forward_pre_hook(partial(self._called, b.name))
                for b in self._blocks.values()
            ]
            stack.enter_context(hooked(handles))
            bar = progress_bar(WHOLE, "Pruning", self._shown and not lines, FORMAT)
            self._bar = stack.enter_context(bar)
            yield

    def solved(self, report: LayerReport) -> None:
        """A layer is."""
        self._solve.take(self._costs[report.name], self._lap())
        self._bar.set_postfix_str(report.brief(), refresh=False)
        self._show()

    def finished(self, block: Block) -> None:
        """A block is pruned, packed and written."""
        del self._blocks[block.name]
        self._solve.seconds += self._lap()
        self._usual, self._calls = self._calls, 0
        self._set_left()
        done = f"block {self._total - len(self._blocks)} of {self._total}"
        self._bar.set_description(f"Pruning: {done}", refresh=False)
        self._show()
        if self._lines:
            rest = self.seconds_left
            time_left = f", {duration(rest)} left" if rest else ""
            sys.stderr.write(f"Pruning: {done}, {block.name}{time_left}\n")

    def _set_left(self) -> None:
        """Of whole blocks."""
        sizes = [self._sizes[name] for name in self._blocks]
        # Nothing behind the last block is of use: it isn't called for that.
        unused = min(self._batches, self._usual) * sizes[-1] if sizes else 0
        self._run.left = float(self._usual * sum(sizes) - unused)
        names = (name for block in self._blocks.values() for name in block.targets)
        self._solve.left = sum(self._costs[name] for name in names)

    def _called(self, block: str, *_: Any) -> None:
        self._calls += 1
        self._run.take(self._sizes[block], self._lap())
        self._show()

    def _lap(self) -> float:
        """Seconds since the last piece of work."""
        before, self._clock = self._clock, time.perf_counter()
        return self._clock - before

    def _show(self) -> None:
        rest = self.seconds_left
        if rest is not None:
            passed = self._clock - self._began
            whole = passed + rest  # 0 where the clock is too coarse to tell
            before, self._percent = self._percent, WHOLE * passed / whole if whole else WHOLE
            self._bar.update(self._percent - before)
