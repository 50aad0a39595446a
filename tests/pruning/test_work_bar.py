"""What is told of a run while it lasts."""

import subprocess
import sys

import pytest
from killed_runs import config
from tiny_models import tiny_llama
from torch import nn
from transformers.utils import logging

import hf_sparse
from hf_sparse.layers.blocks import Block
from hf_sparse.pruning import work_bar
from hf_sparse.pruning.work_bar import WorkBar


class Layer:
    def __init__(self, name: str) -> None:
        self.name = name

    def brief(self) -> str:
        return self.name


def test_the_time_left_is_that_of_the_calls_and_the_solves_that_are_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(work_bar.time, "perf_counter", lambda: now[0])
    blocks = [Block(str(i), nn.Linear(2, 2), (f"{i}.a", f"{i}.b")) for i in range(4)]
    costs = {name: 1.0 if name[-1] == "a" else 3.0 for b in blocks for name in b.targets}

    def call(block: Block) -> None:
        now[0] += 1.0  # each call takes a second, and each unit of solving ten
        block.module(block.module.weight)

    bar = WorkBar(blocks, 4, costs, batches=3)
    with bar.watching():
        assert bar.seconds_left is None
        for place, block in enumerate(blocks):
            behind = sum(3 + (3 if b is not blocks[-1] else 0) + 40 for b in blocks[place + 1 :])
            for _ in range(3):
                call(block)
            on = 3 if block is not blocks[-1] else 0
            if place:
                assert bar.seconds_left == pytest.approx(behind + on + 40)
            now[0] += 10
            bar.solved(Layer(f"{place}.a"))
            assert bar.seconds_left == pytest.approx(behind + on + 30)
            now[0] += 30
            bar.solved(Layer(f"{place}.b"))
            for _ in range(on):
                call(block)
            bar.finished(block)
            assert bar.seconds_left == pytest.approx(behind)
    assert not any(block.module._forward_pre_hooks for block in blocks)


def test_without_a_terminal_there_is_a_line_a_block(capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    logging.enable_progress_bar()
    hf_sparse.prune(tiny_llama(), config())
    lines = [line for line in capfd.readouterr().err.splitlines() if "Pruning" in line]
    assert [line.partition(", ")[0] for line in lines] == [
        "Pruning: block 1 of 2",
        "Pruning: block 2 of 2",
    ]
    assert lines[0].endswith("left")


@pytest.mark.parametrize("silence", ["bars", "verbosity", "tqdm"])
def test_what_silences_transformers_or_tqdm_silences_it(silence, capfd, monkeypatch):
    before = logging.get_verbosity()
    try:
        if silence == "bars":
            logging.disable_progress_bar()
        elif silence == "verbosity":
            logging.set_verbosity_error()
        else:
            code = (
                "from tiny_models import tiny_llama; from hf_sparse import SparseConfig, prune;"
                "prune(tiny_llama(), SparseConfig(method='magnitude'))"
            )
            monkeypatch.setenv("TQDM_DISABLE", "1")
            monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
            subprocess.run([sys.executable, "-c", code], check=True)
        if silence != "tqdm":
            hf_sparse.prune(tiny_llama(), config())
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(before)
    assert "Pruning" not in capfd.readouterr().err
