"""The processes that work on one run together, over torch.distributed; alone there is one.

Once all have arrived they meet in `gather` alone, and in sums and copies of tensors that follow it.
A process that fails comes there once more, with its error, so that the others end with it. One that
dies is noticed at the next meeting, or within seconds where it ran on the same machine.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .arrivals import Arrivals, Person, is_alive
from .errors import ProcessError

T = TypeVar("T")

# What one step of one process may take while the others wait for it.
LONGEST_STEP = timedelta(days=2)
# Seconds between two looks at whether the others are alive.
LOOK = 5.0


class Processes:
    """One process, alone.

    Attributes:
        rank: the number of this one.
        size: how many there are.
    """

    rank = 0
    size = 1

    @staticmethod
    def here() -> Processes:
        """Those of torch's process group, or of the launcher (torchrun, accelerate) that started
        this process; else this one alone."""
        if not dist.is_available():
            return ALONE
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
                return ALONE
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available())
        if dist.get_world_size() < 2:
            return ALONE
        world = dist.group.WORLD
        if world not in _GROUPS:
            _GROUPS.clear()
            _GROUPS[world] = Group()
        return _GROUPS[world]

    @property
    def is_first(self) -> bool:
        """Does this one write what all have made?"""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of some items that are this process's."""
        return items[self.rank :: self.size]

    def number(self, index: int) -> int:
        """The place among all items of one of `share`'s."""
        return self.rank + index * self.size

    def gather(self, value: T) -> list[T]:
        """What each process brings here, by rank.

        Raises:
            ProcessError: one has failed, or is gone.
        """
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, everywhere; the others wait for it."""
        return make()

    def check_same(self, values: Mapping[str, object]) -> None:
        """Have all processes been given the same?

        Raises:
            ProcessError: they haven't; says what differs.
        """
        for rank, theirs in enumerate(self.gather(dict(values))):
            for what, mine in values.items():
                if theirs.get(what) != mine:
                    there, here = _where_they_differ(str(theirs.get(what)), str(mine))
                    raise ProcessError(
                        f"process {rank} prunes something else than process {self.rank}: {what} "
                        f"is {there} there and {here} here"
                    )

    def sum(self, tensor: Tensor, owner: int | None) -> None:
        """Add up a tensor in its place: in the process `owner`, or for None in all."""

    def send(self, tensor: Tensor, owner: int) -> None:
        """Fill a contiguous tensor with what it holds in the process `owner`."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """While a run lasts: an error of one process ends all."""
        yield


ALONE = Processes()


@dataclass(frozen=True)
class _Failure:
    text: str


class Group(Processes):
    """The processes of torch's default group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._running = self._told = False
        self._arrivals = Arrivals(self.rank, self.size)
        self._people: list[Person] = []
        self._gone: list[int] = []

    @cached_property
    def _group(self) -> Any:
        """For tensors in main memory; made when all begin."""
        return dist.new_group(backend="gloo", timeout=LONGEST_STEP)

    def gather(self, value: T) -> list[T]:
        brought: list[Any] = [None] * self.size
        with self._noticing():
            dist.all_gather_object(brought, value, group=self._group)
        for rank, other in enumerate(brought):
            if isinstance(other, _Failure):
                self._told = True
                raise ProcessError(f"process {rank} of {self.size} failed: {other.text}")
        return brought

    def from_first(self, make: Callable[[], T]) -> T:
        return self.gather(make() if self.is_first else None)[0]  # type: ignore[return-value]

    def sum(self, tensor: Tensor, owner: int | None) -> None:
        with self._noticing():
            if owner is None:
                dist.all_reduce(tensor, group=self._group_of(tensor))
            else:
                dist.reduce(tensor, owner, group=self._group_of(tensor))

    def send(self, tensor: Tensor, owner: int) -> None:
        with self._noticing():
            raw = tensor.view(-1).view(torch.uint8)  # gloo doesn't know all dtypes
            dist.broadcast(raw, owner, group=self._group_of(tensor))

    def _group_of(self, tensor: Tensor) -> Any:
        return self._group if tensor.device.type == "cpu" else None

    @contextmanager
    def together(self) -> Iterator[None]:
        if self._running:
            yield
            return
        self._running, self._told = True, False
        try:
            with self._watched():
                yield
        finally:
            self._running = False

    @contextmanager
    def _watched(self) -> Iterator[None]:
        self._begin()
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watch.start()
        try:
            yield
            self.gather(None)
        except KeyboardInterrupt:
            if self._gone:
                self._told = True
                raise ProcessError(self._who()) from None
            self._tell("it was interrupted")
            raise
        except BaseException as error:
            self._tell(str(error) or type(error).__name__)
            raise
        finally:
            over.set()
            watch.join()

    def _begin(self) -> None:
        """Wait for all to begin."""
        self._people = self._arrivals.wait()
        self.gather(None)
        self._arrivals.leave()

    def _tell(self, text: str) -> None:
        """Come to the others' next meeting with an error."""
        if not self._told:
            self._told = True
            with suppress(RuntimeError):
                dist.all_gather_object([None] * self.size, _Failure(text), group=self._group)

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Meetings end with a RuntimeError where a process is gone."""
        try:
            yield
        except RuntimeError as error:
            self._told = True
            waited = threading.Event()
            for _ in range(20):
                if self._find_gone():
                    break
                waited.wait(0.25)
            raise ProcessError(self._who()) from error

    def _watch(self, over: threading.Event) -> None:
        import _thread

        while not over.wait(LOOK):
            if self._find_gone():
                _thread.interrupt_main()
                return

    def _find_gone(self) -> list[int]:
        people = enumerate(self._people)
        self._gone = [rank for rank, person in people if not is_alive(person)]
        return self._gone

    def _who(self) -> str:
        who = ", ".join(f"process {rank}" for rank in self._gone) or "a process on another machine"
        return f"of {self.size} processes these ended, and the others can't go on: {who}"


def _where_they_differ(one: str, other: str) -> tuple[str, str]:
    """Two texts from shortly before the first difference on."""
    pairs = enumerate(zip_longest(one, other))
    start = max(next((i for i, (a, b) in pairs if a != b), 0) - 40, 0)
    dots = "..." if start else ""
    return f"{dots}{one[start:]:.120}", f"{dots}{other[start:]:.120}"


# Of the process group that is initialised.
_GROUPS: dict[Any, Group] = {}
