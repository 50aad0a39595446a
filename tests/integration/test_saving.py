"""What reaches the disk: whole or not at all, safe to open elsewhere, convertible back to dense."""

import copy
import json
import os
import pickle

import fresh
import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from conftest import logits
from hf_sparse import SaveError, SparseConfig, SparseLinear


@pytest.fixture
def sparse(tiny):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", sparsity=0.6))
    return tiny


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_saving_into_a_file_is_an_error_that_names_it(sparse, tmp_path):
    (tmp_path / "taken").write_text("precious")
    for save in (sparse.save_pretrained, lambda path: hf_sparse.export_dense(sparse, path)):
        with pytest.raises(SaveError, match=r"taken.*is a file"):
            save(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "precious"


def fails_after(count, monkeypatch):
    """Make the disk full after `count` weight files."""
    from transformers import modeling_utils

    real = modeling_utils.safe_save_file
    written = []

    def save(tensors, path, *args, **kwargs):
        if len(written) == count:
            path = os.fspath(path)
            with open(path, "wb") as file:
                file.write(b"half of it")
            raise OSError(28, "No space left on device")
        written.append(path)
        return real(tensors, path, *args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", save)


@pytest.mark.parametrize("count", [0, 2])
def test_a_disk_that_fills_up_leaves_no_new_folder(sparse, tmp_path, monkeypatch, count):
    fails_after(count, monkeypatch)
    with pytest.raises(SaveError, match=r"new.*nothing was changed.*No space left"):
        sparse.save_pretrained(tmp_path / "a" / "new", max_shard_size="4KB")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_an_older_checkpoint_as_it_was(
    sparse, tmp_path, monkeypatch, token_ids
):
    folder = tmp_path / "model"
    sparse.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    before = files(folder)
    other = copy.deepcopy(sparse)
    fails_after(0, monkeypatch)
    with pytest.raises(SaveError, match="No space left"):
        other.save_pretrained(folder)
    assert files(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_saving_over_a_checkpoint_removes_its_stale_shards(sparse, tmp_path, token_ids):
    sparse.save_pretrained(tmp_path, max_shard_size="4KB")
    (tmp_path / "notes.txt").write_text("mine")
    sparse.save_pretrained(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
        "pruning_report.json",
    ]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, token_ids), logits(sparse, token_ids))


def test_a_checkpoint_has_its_report_and_gives_it_back(sparse, tmp_path):
    sparse.save_pretrained(tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    assert again.hf_quantizer.report == sparse.hf_quantizer.report
    again.save_pretrained(tmp_path / "twice")
    assert files(tmp_path / "twice") == files(tmp_path / "once")
    hf_sparse.export_dense(again, tmp_path / "twice")  # no longer what the report tells of
    assert not (tmp_path / "twice" / "pruning_report.json").exists()


def test_a_damaged_report_does_not_keep_a_model_from_loading(sparse, tmp_path, monkeypatch):
    sparse.save_pretrained(tmp_path)
    (tmp_path / "pruning_report.json").write_text('{"layers": 1}')
    said = []
    monkeypatch.setattr(
        hf_sparse.pruning.saved_report.logger, "warning", lambda *args: said.append(args)
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path).hf_quantizer.report is None
    assert "pruning_report.json, layers: 1 is no list" in said[0][1]


def test_the_saved_config_never_has_a_sparsity_config(sparse, tmp_path):
    sparse.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hf_sparse"
    assert "sparsity_config" not in json.dumps(config)


def test_copies_and_pickles_work_and_save_like_the_original(sparse, tmp_path, token_ids):
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        with torch.no_grad():
            other.model.norm.weight.mul_(2)
        other.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(again, token_ids), logits(other, token_ids))
        assert not torch.equal(logits(again, token_ids), logits(sparse, token_ids))


def test_a_model_that_was_cast_is_dense_again_in_the_dtype_it_was_cast_to(tiny, token_ids):
    tiny.config.dtype = torch.float32  # as of a model that was loaded in it
    tiny.bfloat16()
    hf_sparse.prune(tiny, SparseConfig(method="magnitude"))
    sparse = logits(tiny, token_ids)
    tiny.dequantize()
    assert {parameter.dtype for parameter in tiny.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(tiny, token_ids), sparse, rtol=0.05, atol=0.01)


def test_dequantize_gives_plain_layers_with_the_same_weights(sparse, tmp_path, token_ids):
    before = logits(sparse, token_ids)
    dense = sparse.dequantize()
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())
    torch.testing.assert_close(logits(dense, token_ids), before)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


PLAIN = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "hf_sparse" not in sys.modules
zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if "proj" in n)
sys.stdout.write(f"zeros={zeros} dtype={model.dtype}")
"""


def test_a_dense_export_loads_in_plain_transformers(sparse, tmp_path, token_ids):
    sparse.save_pretrained(tmp_path / "sparse")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.bfloat16)
    expected = logits(model, token_ids)
    hf_sparse.export_dense(model, tmp_path / "export", max_shard_size="16KB")
    assert any(isinstance(module, SparseLinear) for module in model.modules())
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert "quantization_config" not in config
    result = fresh.run(PLAIN, tmp_path / "export")
    assert result.returncode == 0, result.stderr
    zeros = sum(layer.zeros for layer in sparse.hf_quantizer.report.layers)
    assert result.stdout.endswith(f"zeros={zeros} dtype=torch.bfloat16")
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(logits(export, token_ids), expected)
