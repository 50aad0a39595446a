"""Several processes of one process group, forked from this one, which has a single thread."""

import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist


def in_processes(
    size: int, work: Callable[[int], Any], killed: int | None = None, after: float = 0.0
) -> list[Any]:
    """What `work(rank)` returns in each of `size` processes, or the exception that it raises.

    The process `killed` gets SIGKILL after some seconds, and None stands for what it makes.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [_start(rank, size, work, Path(folder)) for rank in range(size)]
        if killed is not None:
            time.sleep(after)
            os.kill(children[killed], signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        files = [Path(folder, f"{rank}.pickle") for rank in range(size)]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def _start(rank: int, size: int, work: Callable[[int], Any], folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        try:
            made = work(rank)
        except Exception as error:
            made = error
        Path(folder, f"{rank}.part").write_bytes(pickle.dumps(made))
        os.replace(folder / f"{rank}.part", folder / f"{rank}.pickle")
    finally:
        os._exit(0)
    raise AssertionError
