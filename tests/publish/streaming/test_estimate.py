"""What a run will take, counted by hand, and what can't fit."""

import json
from functools import partial
from unittest.mock import Mock

import psutil
import pytest
import torch
from killed_runs import config, digests
from tiny_models import DECODER, build, tiny_llama
from transformers import MixtralConfig, MixtralForCausalLM

from conftest import save_with_tokenizer
from hf_sparse import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    Rates,
    SaveError,
    SparseConfig,
    estimate,
    prune_checkpoint,
)
from hf_sparse.publish.streaming import rates as measured
from hf_sparse.publish.streaming import residence
from hf_sparse.publish.streaming import source as source_weights

BLOCK = 24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 40  # two heads of 6 for keys and values
TOKENS = 6 * 24


@pytest.fixture
def source(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_operations_are_those_of_each_layer_and_shared_input(source):
    found = estimate(source, config(), measure=False)
    assert (found.blocks, found.weights, found.tokens) == (2, 2 * BLOCK, TOKENS)
    assert found.operations["Hessians"] == 2 * (3 * 24**2 + 40**2) * TOKENS
    assert found.operations["factors"] == 2 * (3 * 24**3 + 40**3)
    assert found.operations["solving"] == 2 * ((24 * 2 + 12 * 2 + 80) * 24**2 + 24 * 40**2)
    norms = 2 * 24
    assert found.operations["forward"] == 2 * 2 * 2 * (BLOCK + norms) * TOKENS


def test_experts_are_met_by_the_tokens_that_are_routed_to_them(tmp_path):
    settings = DECODER | {"num_local_experts": 4, "num_experts_per_tok": 1}
    build(MixtralForCausalLM, MixtralConfig(**settings)).save_pretrained(tmp_path)
    found = estimate(tmp_path, config(targets=["experts"]), measure=False)
    assert found.operations["Hessians"] == 2 * (24**2 + 40**2) * TOKENS


def test_memory_at_the_peak_is_the_block_its_hessians_and_the_layer_at_work(source):
    found = estimate(source, config(), measure=False)
    assert found.memory["block"] == 4 * (BLOCK + 48)
    assert found.memory["Hessians"] == 4 * (3 * 24**2 + 40**2)
    assert found.memory["activations"] == 4 * TOKENS * 24
    assert found.memory["solving"] == max(8 * 40**2, 18 * 24 * 40)


def test_time_is_work_by_rates(source):
    rates = Rates(
        forward=1e6, single=2e6, double=4e6, weights=1e3, disk=1e5, call=0.125, start=0.25
    )
    found = estimate(source, config(), rates=rates)
    work = found.operations
    expected = 0.25 + found.calls * 0.125
    expected += work["forward"] / 1e6 + (work["Hessians"] + work["solving"]) / 2e6
    expected += work["factors"] / 4e6 + 2 * BLOCK / 1e3
    expected += (found.bytes_read + found.bytes_written) / 1e5
    assert found.seconds == pytest.approx(expected)


def test_what_is_missing_is_named(source):
    with pytest.raises(ConfigError, match="needs a SparseConfig, got NoneType"):
        estimate(source, None, measure=False)
    content = json.loads((source / "config.json").read_text())
    for key, error, message in (
        ("dtype", ConfigError, "names no dtype"),
        ("architectures", CheckpointError, "no 'architectures'"),
    ):
        without = {name: value for name, value in content.items() if name != key}
        (source / "config.json").write_text(json.dumps(without))
        for weights in source.glob("*.safetensors"):
            weights.unlink()
        with pytest.raises(error, match=message):
            estimate(source, config(), measure=False)


def test_no_weights_are_needed(source):
    (source / "model.safetensors").unlink()
    assert estimate(source, SparseConfig(method="magnitude"), measure=False).tokens == 0


def test_a_run_that_cannot_fit_is_refused_before_it_begins(source, tmp_path):
    with pytest.raises(ConfigError, match=r"needs .* GB of memory .*Hessians .*max_memory"):
        prune_checkpoint(source, config(), tmp_path / "disk", max_memory="10MB")
    for size in ("much", "3Gb"):
        with pytest.raises(ConfigError, match=f"max_memory='{size}' is no size"):
            prune_checkpoint(source, config(), tmp_path / "disk", max_memory=size)
    assert not (tmp_path / "disk").exists()


def test_activations_wait_in_a_file_if_they_do_not_fit(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "dense")
    ids = torch.randint(3, 61, (64, 64))
    settings = config(method="wanda", dataset=list(ids), num_samples=64, seq_len=64, batch_size=64)
    folders = []
    original = residence.Streamed.__init__

    def spied(self, source, ledger, waiting):
        folders.append(waiting)
        original(self, source, ledger, waiting)

    monkeypatch.setattr(residence.Streamed, "__init__", spied)
    needed = estimate(tmp_path / "dense", settings, measure=False)
    prune_checkpoint(tmp_path / "dense", settings, tmp_path / "whole")
    limit = needed.peak + 200_000_000
    monkeypatch.setattr(
        "hf_sparse.publish.streaming.estimate.Estimate.peak_without_activations",
        property(lambda x: 0),
    )
    prune_checkpoint(tmp_path / "dense", settings, tmp_path / "filed", max_memory=limit // 100)
    assert folders[0] is None
    assert folders[1].name.startswith("waiting-")
    assert digests(tmp_path / "whole") == digests(tmp_path / "filed")


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_this_machine_is_measured_in_the_dtype_of_the_model(method, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "SECONDS", 0.01)
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    data = {} if method == "sparsegpt" else {"dataset": None}
    found = estimate(tmp_path, config(method, **data))
    assert found.seconds > 0
    assert min(found.rates.forward, found.rates.double, found.rates.weights) > 0


def test_data_that_are_at_hand_are_counted(source):
    rows = [{"input_ids": torch.randint(3, 61, (2, 7))} for _ in range(3)]
    found = estimate(source, SparseConfig(method="wanda", dataset=rows), measure=False)
    assert (found.tokens, found.calls) == (3 * 2 * 7, 2 * 2 * 3)
    ids = [list(range(3, 8)), list(range(3, 30))]
    settings = SparseConfig(method="wanda", dataset=ids, seq_len=10, batch_size=1)
    assert estimate(source, settings, measure=False).tokens == 5 + 10


def test_what_is_not_at_hand_counts_as_what_was_asked_for(source):
    once = iter([{"input_ids": torch.randint(3, 61, (1, 7))}])
    for data in (["some text, but no tokenizer"], "wikitext2", once):
        settings = SparseConfig(method="wanda", dataset=data, num_samples=5, seq_len=10)
        found = estimate(source, settings, measure=False)
        assert found.tokens == 5 * 10
    assert len(list(once)) == 1


def test_texts_and_files_are_counted_with_the_tokenizer(tmp_path):
    source = save_with_tokenizer(tmp_path / "dense")
    with pytest.raises(CalibrationError, match=r"data\.txt.* no such file"):
        estimate(source, SparseConfig(method="wanda", dataset="data.txt"), measure=False)
    text = "one two three four five six seven. " * 20
    (tmp_path / "data.txt").write_text(text)
    for data in ([text], tmp_path / "data.txt"):
        settings = SparseConfig(method="wanda", dataset=data, num_samples=500, seq_len=10)
        found = estimate(source, settings, measure=False)
        report = prune_checkpoint(source, settings, tmp_path / "out")
        assert found.tokens == report.data.count * 10
        assert 0 < report.data.count < 500


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("resumable", [False, True])
def test_bytes_read_and_written_are_those_of_a_run(method, resumable, tmp_path, monkeypatch):
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    tiny_llama(**size).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    ids = torch.randint(3, 61, (64, 64)).tolist() if method == "wanda" else None
    data = {"dataset": ids, "num_samples": 64, "seq_len": 64, "batch_size": 8}
    settings = config(method, **data)
    said = estimate(tmp_path / "dense", settings, measure=False, resumable=resumable)
    read = 0
    original = source_weights._InFile.__getitem__

    def counted(self, index):
        nonlocal read
        tensor = original(self, index)
        read += tensor.nbytes
        return tensor

    monkeypatch.setattr(source_weights._InFile, "__getitem__", counted)
    before = psutil.Process().io_counters()
    run = tmp_path / "run" if resumable else None
    prune_checkpoint(tmp_path / "dense", settings, tmp_path / "out", checkpoint_dir=run)
    after = psutil.Process().io_counters()
    result = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert said.result == pytest.approx(result, rel=0.1)
    written = after.write_chars - before.write_chars
    assert said.bytes_written == pytest.approx(written, rel=0.15)
    # Tensors are read through mapped pages, which the system doesn't count, blocks likewise.
    read += after.read_chars - before.read_chars + result
    assert said.bytes_read == pytest.approx(read, rel=0.2)


def test_a_disk_without_room_is_told_before_the_run_which_is_there_already(
    source, tmp_path, monkeypatch
):
    needed = estimate(source, config(), measure=False, resumable=True)
    run = partial(prune_checkpoint, source, config(), tmp_path / "out")

    def with_free(size):
        usage = Mock(return_value=Mock(free=size))
        monkeypatch.setattr("hf_sparse.publish.streaming.folders.shutil.disk_usage", usage)

    with_free(needed.kept + needed.result - 1)
    with pytest.raises(ConfigError, match="GB of disk, for finished blocks and the result"):
        run(checkpoint_dir=tmp_path / "run")
    with monkeypatch.context() as dying:
        with_free(needed.kept + needed.result)
        dying.setattr("hf_sparse.publish.streaming.run._write_config", Mock(side_effect=OSError))
        with pytest.raises(SaveError):
            run(checkpoint_dir=tmp_path / "run")
    there = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    with_free(needed.kept + needed.result - there)
    assert run(checkpoint_dir=tmp_path / "run").layers
