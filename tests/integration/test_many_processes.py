"""Processes that prune together end as one process does, or all of them with an error."""

import copy
import os
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from killed_runs import config, make_model
from tiny_models import DECODER, build, tiny_llama
from together import in_processes
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import hf_sparse
from hf_sparse import CalibrationError, ConfigError, ProcessError, SolveError, prune_checkpoint
from hf_sparse.core import arrivals
from hf_sparse.layers import sparse_layers


def tiny_mixtral():
    return build(MixtralForCausalLM, MixtralConfig(**DECODER, num_local_experts=4))


def weights(model):
    return {name: layer.sparse_weight.clone() for name, layer in sparse_layers(model).items()}


def pruned(model, **changes):
    """Weights and report of a copy of a model."""
    model = copy.deepcopy(model)
    report = hf_sparse.prune(model, config(**changes))
    return weights(model), report


def assert_alike(found, expected, kept=1.0):
    """Weights are those of one process but for the order of sums, which ties may feel."""
    assert list(found) == list(expected)
    for name, weight in expected.items():
        same = (found[name] != 0) == (weight != 0)
        assert same.float().mean() >= kept, name
        both = same & (weight != 0)
        torch.testing.assert_close(found[name][both], weight[both], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "wanda"},
        {"method": "sparsegpt"},
        {"method": "sparsegpt", "pattern": "2:4", "low_rank": 2},
        {"method": "magnitude"},
        {"method": "sparsegpt", "refit": 4, "stages": True, "target": "dense", "bits": 4},
    ],
    ids=["wanda", "sparsegpt", "low rank", "magnitude", "dense target, stages, bits"],
)
def test_processes_together_make_what_one_makes(size, changes):
    model = tiny_llama(num_hidden_layers=2)
    expected, report = pruned(model, **changes)
    results = in_processes(size, lambda rank: pruned(model, **changes))
    for found, theirs in results:
        assert_alike(found, expected, kept=0.97)
        assert [x.name for x in theirs.layers] == [x.name for x in report.layers]
        assert [x.tokens for x in theirs.layers] == [x.tokens for x in report.layers]
        assert [x.zeros for x in theirs.layers] == [x.zeros for x in report.layers]
        assert theirs.data == report.data
        for one, other in zip(report.layers, theirs.layers, strict=True):
            assert other.relative_error == pytest.approx(one.relative_error, rel=0.02)
        assert all(map(torch.equal, found.values(), results[0][0].values()))
    assert report.sparsity == theirs.sparsity


def test_experts_that_only_one_process_meets_have_all_statistics():
    model = tiny_mixtral()
    expected, report = pruned(model, method="wanda", moe_min_tokens=20)
    for found, theirs in in_processes(
        3, lambda rank: pruned(model, method="wanda", moe_min_tokens=20)
    ):
        assert_alike(found, expected, kept=0.999)
        assert [x.tokens for x in theirs.layers] == [x.tokens for x in report.layers]
        assert [x.notes for x in theirs.layers] == [x.notes for x in report.layers]


def test_the_error_of_one_process_ends_all():
    def work(rank):
        model = tiny_llama(num_hidden_layers=2)
        if rank == 1:  # what it computes from there on is NaN, and found when statistics are frozen
            model.model.layers[1].input_layernorm.weight.data.fill_(float("nan"))
        return pruned(model, method="sparsegpt")

    first, second = in_processes(2, work)
    kinds = {type(first), type(second)}
    assert kinds <= {ProcessError, SolveError}
    assert SolveError in kinds
    assert any("NaN" in str(error) for error in (first, second))
    assert all("half pruned" in str(error) for error in (first, second))


def test_a_process_that_dies_ends_the_others_which_name_it():
    model = tiny_llama(num_hidden_layers=2)

    def work(rank):
        layer = model.model.layers[1].mlp
        if rank == 1:
            layer.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        return pruned(model, method="sparsegpt")

    first, second, third = in_processes(3, work)
    assert second is None
    for error in (first, third):
        assert isinstance(error, ProcessError)
        assert "of 3 processes these ended" in str(error)
        assert "process 1" in str(error)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda rank: {"damping": 0.01 * (rank + 1)}, ProcessError, "prunes something else"),
        (lambda rank: {"batch_size": 6}, ConfigError, "1 batches can't be split over 2 processes"),
        (lambda rank: {"experts": 0.5}, ConfigError, "experts=0.5 is chosen by one process"),
    ],
    ids=["another config", "one batch", "experts"],
)
def test_what_can_not_be_done_together_is_told_before_the_work(change, kind, words):
    model = tiny_mixtral()
    errors = in_processes(2, lambda rank: pruned(model, method="sparsegpt", **change(rank)))
    assert any(isinstance(error, kind) and words in str(error) for error in errors)
    assert all(isinstance(error, (kind, ProcessError)) for error in errors)
    assert not any("half pruned" in str(error) for error in errors)


def read(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".json") and path.name != "pruning_report.json"
    }


def test_from_disk_to_disk_the_first_writes_what_all_make(tmp_path):
    dense = make_model(tmp_path)
    prune_checkpoint(dense, config("wanda"), tmp_path / "one")

    def work(rank):
        return prune_checkpoint(dense, config("wanda"), tmp_path / "two").sparsity

    assert in_processes(2, work) == [0.5, 0.5]
    assert read(tmp_path / "two") == read(tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "one", "two"}


def test_from_disk_to_disk_other_arguments_are_told_before_the_work(tmp_path):
    dense = make_model(tmp_path)
    given = {  # by rank, and what the error of both says
        "checkpoint_dir is": lambda rank: {"checkpoint_dir": tmp_path / f"run{rank}"},
        "checkpoint_dir is None": lambda rank: {
            "checkpoint_dir": tmp_path / "run" if rank else None
        },
        "output_dir is": lambda rank: {"output_dir": tmp_path / f"out{rank}"},
        "dtype is": lambda rank: {"dtype": ["auto", "bfloat16"][rank]},
        "the model is": lambda rank: {"model_id_or_path": [dense, tmp_path / "no"][rank]},
    }
    for text, change in given.items():
        usual = {"model_id_or_path": dense, "config": config("wanda"), "output_dir": tmp_path / "x"}
        errors = in_processes(
            2, lambda rank, change=change, usual=usual: prune_checkpoint(**usual | change(rank))
        )
        assert all(isinstance(error, ProcessError) for error in errors)
        assert all("prunes something else" in str(error) for error in errors)
        assert any(text in str(error) for error in errors)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


@pytest.mark.parametrize(
    "change", [{"max_memory": "1MB"}, {"max_shard_size": "much"}, {"config": config(experts=0.5)}]
)
def test_a_process_that_fails_before_the_work_ends_the_others(tmp_path, change):
    dense = make_model(tmp_path)

    def work(rank):
        usual = {"config": config("wanda"), "output_dir": tmp_path / "x"}
        return prune_checkpoint(dense, **usual | (change if rank else {}))

    first, second = in_processes(2, work)
    assert isinstance(second, ConfigError)
    assert isinstance(first, ProcessError)
    assert str(second)[:40] in str(first)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_a_process_that_ends_before_it_prunes_ends_the_others_which_name_it(tmp_path):
    dense = make_model(tmp_path)

    def work(rank):
        data = str(tmp_path / "no.txt") if rank == 1 else [list(range(3, 40))] * 3
        settings = config("wanda", dataset=data, num_samples=3, batch_size=1)
        return AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings)

    first, second, third = in_processes(3, work)
    assert isinstance(second, CalibrationError)
    for error in (first, third):
        assert isinstance(error, ProcessError)
    assert any("process 1 ended before pruning" in str(error) for error in (first, third))


def test_a_process_that_does_not_prune_is_named_and_may_come_the_next_time(monkeypatch):
    monkeypatch.setattr(arrivals, "BEGIN", 1.0)
    monkeypatch.setattr(arrivals, "PATIENCE", 0.1)
    monkeypatch.setattr(arrivals, "logger", told := Mock())
    model = tiny_llama()

    def work(rank):
        if rank == 0:
            with pytest.raises(ProcessError, match=r"2 processes .*process 1 did not prune"):
                pruned(model, method="magnitude")
            assert "process 1" in str(told.warning.call_args)
            monkeypatch.setattr(arrivals, "BEGIN", 60.0)
        else:
            time.sleep(1.5)
        return len(pruned(model, method="magnitude")[0])

    assert in_processes(2, work) == [14, 14]


def test_a_run_whose_process_died_goes_on_with_another_number_of_processes(tmp_path, monkeypatch):
    dense, run, out = make_model(tmp_path), tmp_path / "run", tmp_path / "out"
    whole = in_processes(2, lambda rank: prune_checkpoint(dense, config("wanda"), tmp_path / "x"))
    assert all(not isinstance(report, Exception) for report in whole)

    def dies(rank):
        from hf_sparse.publish.streaming.residence import Streamed

        finish = Streamed.finish

        def counted(self, block, done):
            if rank == 1 and block.name.endswith(".3"):
                os.kill(os.getpid(), signal.SIGKILL)
            finish(self, block, done)

        Streamed.finish = counted
        return prune_checkpoint(dense, config("wanda"), out, checkpoint_dir=run)

    first, second = in_processes(2, dies)
    assert second is None
    assert "process 1" in str(first)
    assert not out.exists()
    assert len(list((run / "blocks").iterdir())) == 3
    reports = in_processes(
        3, lambda rank: prune_checkpoint(dense, config("wanda"), out, checkpoint_dir=run)
    )
    assert all(report.sparsity == 0.5 for report in reports)
    assert read(out) == read(tmp_path / "x")
    assert not run.exists()


@pytest.mark.slow
def test_a_launcher_starts_them(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "hf_sparse_cli", "prune", str(make_model(tmp_path)), "--method", "magnitude"]
    for number, more in enumerate(([], ["--checkpoint-dir", str(tmp_path / "run")])):
        output = tmp_path / f"out{number}"
        done = subprocess.run(
            [*command, "--output", str(output), *more], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("saved in") == 1
    assert read(tmp_path / "out0") == read(tmp_path / "out1")
