"""Runs from disk to disk that die again and again.

As a program: `killed_runs.py FOLDER KILLS SEED [METHOD]` makes a tiny model in FOLDER, prunes it
undisturbed, then in processes that are killed at random moments until KILLS have been, then to the
end, and prints the digests of both results.
"""

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_models import tiny_llama

from hf_sparse import SparseConfig, prune_checkpoint

BLOCKS = 6


def make_model(folder: Path) -> Path:
    """The dense checkpoint."""
    tiny_llama(num_hidden_layers=BLOCKS).save_pretrained(folder / "dense")
    return folder / "dense"


def config(method: str = "sparsegpt", **changes) -> SparseConfig:
    """One that takes statistics block by block."""
    random_ids = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 61, (24,), generator=random_ids) for _ in range(6)]
    settings = {"sparsity": 0.5, "dataset": ids, "num_samples": 6, "seq_len": 24, "batch_size": 2}
    if "pattern" in changes:
        del settings["sparsity"]
    return SparseConfig(method=method, **(settings | changes))


def digests(folder: Path) -> dict[str, str]:
    """Of the files that don't say when and how fast they were made."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix in (".safetensors", ".json") and path.name != "pruning_report.json"
    }


def in_a_child(work, after: float | None = None) -> int:
    """Do something in a fork, which is killed after some seconds; the signal or exit status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, kills: int, seed: int, method: str = "sparsegpt") -> bool:
    source = make_model(folder)
    started = time.perf_counter()
    assert in_a_child(lambda: prune_checkpoint(source, config(method), folder / "whole")) == 0
    seconds = time.perf_counter() - started
    moments, killed, runs = random.Random(seed), 0, 0

    def run():
        prune_checkpoint(source, config(method), folder / "killed", checkpoint_dir=folder / "run")

    while killed < kills:
        runs += 1
        if in_a_child(run, moments.uniform(0, 1.2 * seconds)) == -signal.SIGKILL:
            killed += 1
    assert in_a_child(run) == 0
    same = digests(folder / "whole") == digests(folder / "killed")
    print(f"{killed} kills in {runs} runs of {seconds:.2f} s: {'the same' if same else 'other'}")  # noqa: T201
    return same


if __name__ == "__main__":
    numbers = map(int, sys.argv[2:4])
    sys.exit(not main(Path(sys.argv[1]), *numbers, *sys.argv[4:]))
