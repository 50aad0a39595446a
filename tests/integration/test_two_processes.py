"""Two processes that torchrun starts train a sparse model as one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparseConfig
from hf_sparse.checkpoint.state_dict import sparse_state_dict

pytestmark = pytest.mark.slow

TRAINER = """
import json, sys
import torch
from short_runs import arguments, rows_of
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from hf_sparse.training import SparseTrainer, SparsityCallback, finish_training

logging.disable_progress_bar()
base, folder, batch, broadcast = sys.argv[1:5]
token_ids = torch.randint(3, 61, (12, 16), generator=torch.Generator().manual_seed(1))


def train(steps, to, resume=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    teacher = AutoModelForCausalLM.from_pretrained(base).dequantize()
    changes = {"optim": "sgd", "learning_rate": 0.5, "save_strategy": "steps", "save_steps": 2}
    changes |= {"per_device_train_batch_size": int(batch), "lr_scheduler_type": "constant"}
    if broadcast != "default":
        changes["ddp_broadcast_buffers"] = broadcast == "True"
    trainer = SparseTrainer(
        model, arguments(to, max_steps=steps, **changes), train_dataset=rows_of(token_ids),
        callbacks=[SparsityCallback()], teacher=teacher, hidden_weight=0.0,
    )
    trainer.train(resume_from_checkpoint=resume)
    finish_training(model)
    model.save_pretrained(to + "/end")  # on every rank
    return trainer.accelerator.num_processes


processes = train(4, folder)
train(4, folder + "-resumed", folder + "/checkpoint-2")
print("processes", processes)
"""

FSDP = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from hf_sparse.training import prepare_for_training

dist.init_process_group("gloo")
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
token_ids = torch.randint(3, 61, (4, 16), generator=torch.Generator().manual_seed(1))
whole, model = (AutoModelForCausalLM.from_pretrained(sys.argv[1]) for _ in range(2))
for each in (whole, model):
    prepare_for_training(each)
for block in model.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
whole(input_ids=token_ids, labels=token_ids).loss.backward()
own = token_ids.chunk(dist.get_world_size())[dist.get_rank()]
model(input_ids=own, labels=own).loss.backward()
expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
for name, parameter in model.named_parameters():
    found = parameter.grad.full_tensor()
    torch.testing.assert_close(found, expected.pop(name), rtol=1e-4, atol=1e-6, msg=name)
assert not expected
dist.destroy_process_group()
print("processes", 2)
"""


def torchrun(code, folder, processes, *args):
    script = folder / "script.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(script), *map(str, args)]
    helpers = Path(__file__).parents[1] / "helpers"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(helpers), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"processes {processes}" in done.stdout


@pytest.fixture
def base(tiny, tmp_path):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude"))
    tiny.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def state(folder):
    return sparse_state_dict(AutoModelForCausalLM.from_pretrained(folder))[0]


def assert_same(folder, expected):
    found = state(folder)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-6, msg=key)


def test_trainer_on_two_processes_trains_saves_and_resumes_as_on_one(base, tmp_path):
    torchrun(TRAINER, tmp_path, 1, base, tmp_path / "one", 12, "default")
    expected = state(tmp_path / "one" / "end")
    before = state(base)
    moved = [key for key, tensor in expected.items() if not torch.equal(tensor, before[key])]
    assert any(key.endswith("up_proj.weight") for key in moved)
    assert not any("bitmask" in key for key in moved)
    for broadcast in ("default", "True", "False"):
        folder = tmp_path / broadcast
        torchrun(TRAINER, tmp_path, 2, base, folder, 6, broadcast)
        for made in (folder, tmp_path / f"{broadcast}-resumed"):
            assert_same(made / "end", expected)
            assert_same(made / "checkpoint-4", expected)


def test_fully_sharded_on_two_processes_it_has_the_same_gradients(base, tmp_path):
    torchrun(FSDP, tmp_path, 2, base)
