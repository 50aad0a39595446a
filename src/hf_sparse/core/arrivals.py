"""Who of some processes is there, before they can meet: told through torch's store, which one
process can write and read without the others."""

from __future__ import annotations

import json
import socket
import time

import psutil  # type: ignore[import-untyped]
from torch.distributed.distributed_c10d import _get_default_store

from .errors import ProcessError
from .logging import get_logger

logger = get_logger(__name__)

# Seconds in which all processes have to begin, and between two looks at whether they have.
BEGIN = 300.0
LOOK = 0.2
# Seconds after which it is said for whom one waits.
PATIENCE = 10.0

Person = tuple[str, int]


class Arrivals:
    """Of the processes of torch's default group; this one is announced from here on.

    Args:
        rank: this one's.
        size: how many there are.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._store = _get_default_store()
        self._rank, self._size = rank, size
        self._tell("there")

    def wait(self) -> list[Person]:
        """Wait until all have come here: the host and process id of each.

        Raises:
            ProcessError: they haven't, in time, or one of this machine ended before; names them.
        """
        try:
            self._tell("begun")
            return self._all_of("begun")
        except RuntimeError as error:  # as torch's store raises it
            if isinstance(error, ProcessError):
                raise
            raise ProcessError(
                f"of {self._size} processes the one that holds torch's store ended before all "
                f"began to prune: {error}"
            ) from error

    def leave(self) -> None:
        """All have come: the next time they wait for each other anew."""
        self._store.set(self._key("begun", self._rank), "")

    def _all_of(self, step: str) -> list[Person]:
        started = time.monotonic()
        told = False
        while True:
            people = [self._read(step, rank) for rank in range(self._size)]
            found = [person for person in people if person is not None]
            if len(found) == self._size:
                return found
            missing = [rank for rank, person in enumerate(people) if person is None]
            gone = [r for r in missing if (p := self._read("there", r)) and not is_alive(p)]
            waited = time.monotonic() - started
            if gone or waited > BEGIN:
                self.leave()
                names = _names(gone or missing)
                what = "ended before pruning" if gone else f"did not prune within {BEGIN:.0f} s"
                raise ProcessError(
                    f"{self._size} processes prune together, and {names} {what}: see what it says, "
                    "and prune in every process, or before the process group is made"
                )
            if waited > PATIENCE and not told:
                logger.warning("waiting up to %.0f s for %s to prune, too", BEGIN, _names(missing))
                told = True
            time.sleep(LOOK)

    def _tell(self, step: str) -> None:
        own = json.dumps([socket.gethostname(), psutil.Process().pid])
        self._store.set(self._key(step, self._rank), own)

    def _read(self, step: str, rank: int) -> Person | None:
        key = self._key(step, rank)
        if not self._store.check([key]) or not (text := self._store.get(key)):
            return None
        host, pid = json.loads(text)
        return host, pid

    @staticmethod
    def _key(step: str, rank: int) -> str:
        return f"hf_sparse/{step}/{rank}"


def is_alive(person: Person) -> bool:
    """Is a process there? Of another machine it can't be told, and taken to be."""
    host, pid = person
    if host != socket.gethostname():
        return True
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _names(ranks: list[int]) -> str:
    return ", ".join(f"process {rank}" for rank in ranks)
