"""Saves that are killed at random moments, and processes of one run that save to one folder."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_saving_over import SHARDED, hidden, models, same  # noqa: F401
from transformers import AutoModelForCausalLM

from hf_sparse.checkpoint import folder as folder_module

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("HF_SPARSE_KILLS", "100"))
KINDS = ({}, SHARDED)


def begin(work, moment):
    """Start work in a process of its own; return it, and when it came to a moment.

    Args:
        moment: "start", or "commit", when all is written and the first file is about to be moved.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:

        def put_in_place(*args, real=folder_module.put_in_place):
            os.write(write, b"!")
            real(*args)

        try:
            os.close(read)
            if moment == "start":
                os.write(write, b"!")
            else:
                folder_module.put_in_place = put_in_place
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    return child, time.perf_counter()


def test_a_killed_save_leaves_the_old_or_the_new_checkpoint_whole(models, tmp_path):  # noqa: F811
    """Half of the kills at a random moment of all of a save, half in the moving of its files."""
    random_, outcomes, durations = random.Random(0), Counter(), Counter()
    for number, kind in enumerate(KINDS):
        models[0].save_pretrained(tmp_path / f"old{number}", **kind)
    while outcomes.total() < KILLS:
        old, new, moment = (outcomes.total() >> bit & 1 for bit in range(3))
        folder = shutil.copytree(tmp_path / f"old{old}", tmp_path / "target")
        kind, moment = KINDS[new], ("start", "commit")[moment]
        child, began = begin(lambda: models[1].save_pretrained(folder, **kind), moment)  # noqa: B023
        if moment in durations:
            time.sleep(random_.random() * durations[moment])
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            loaded = AutoModelForCausalLM.from_pretrained(folder)
            (which,) = (i for i, model in enumerate(models) if same(loaded, model))
            outcomes[f"{moment}: {('old', 'new')[which]}"] += 1
            models[0].save_pretrained(folder, **kind)
            assert hidden(folder) == []
        else:  # done before: nothing was killed
            assert status == 0
            durations[moment] = time.perf_counter() - began
        shutil.rmtree(folder)
    print(f"\nkilled saves: {dict(outcomes)}")  # noqa: T201 - what a long run is for
    assert {outcome.split()[1] for outcome in outcomes} == {"old", "new"}


SCRIPT = """
import os, sys, time
import torch
import torch.distributed as dist
import hf_sparse
from tiny_models import tiny_llama

folder, times = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo")
rank = dist.get_rank()
model = tiny_llama(num_hidden_layers=1)
for number in range(times):
    # Equal on all ranks, as after a step of DDP, and another one each time.
    with torch.no_grad():
        model.lm_head.weight.fill_(number)
    if number == 0:
        hf_sparse.prune(model, hf_sparse.SparseConfig(method="magnitude"))
    kind = {"max_shard_size": "8KB"} if number % 4 in (1, 2) else {}
    if number % 2:
        dist.barrier()
    time.sleep(rank * number / times / 10)
    model.save_pretrained(folder, **kind)
    dist.barrier()
    if rank == 0:
        os.system(f"cp -r {folder} {folder}-{number}")
    dist.barrier()
dist.destroy_process_group()
"""


def test_all_processes_of_a_run_save_to_one_folder(tmp_path):
    times = 20
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), str(tmp_path / "model"), str(times)]
    helpers = Path(__file__).parents[1] / "helpers"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(helpers), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for number in range(times):
        folder = tmp_path / f"model-{number}"
        assert hidden(folder) == []
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded.lm_head.weight, torch.full_like(loaded.lm_head.weight, number))
        sharded = bool(list(folder.glob("model-*.safetensors")))
        assert sharded == (number % 4 in (1, 2)) != (folder / "model.safetensors").exists()
