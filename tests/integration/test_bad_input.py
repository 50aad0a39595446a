"""Mistakes and damage: a clear error, nothing lost, nothing read out of bounds."""

import json
import re
import shutil
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    SolveError,
    SparseConfig,
    TargetError,
)

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module", params=["unstructured", "2:4"])
def saved(request, tmp_path_factory):
    """A checkpoint as it was saved, and its pattern."""
    model, folder = tiny_llama(), tmp_path_factory.mktemp("saved")
    hf_sparse.prune(model, SparseConfig(method="magnitude", pattern=request.param))
    model.save_pretrained(folder)
    return folder, request.param


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A copy to be damaged."""
    folder, pattern = saved
    return shutil.copytree(folder, tmp_path / "model"), pattern


def rewrite(folder, change=lambda tensors: None, change_metadata=lambda metadata: None):
    """Write a checkpoint again with other tensors or other hf_sparse metadata."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    content = json.loads(metadata["hf_sparse"])
    content = change_metadata(content) or content
    metadata["hf_sparse"] = content if isinstance(content, str) else json.dumps(content)
    save_file(tensors, path, metadata)


def refuses(folder, *words):
    """Loading fails with a CheckpointError that names the file and says all of `words`."""
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    for word in ("model.safetensors", *words):
        assert re.search(word, str(caught.value)), f"{word!r} not in {caught.value}"


def test_a_truncated_file_is_refused(checkpoint):
    folder, _ = checkpoint
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuses(folder, "can't be read")


def test_a_file_with_a_wild_header_is_refused(checkpoint):
    folder, _ = checkpoint
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
    refuses(folder, "can't be read")


def test_a_mask_that_marks_another_number_of_values_is_refused(tiny, tmp_path):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude"))
    tiny.save_pretrained(tmp_path)

    def flip(tensors):
        mask = tensors[f"{LAYER}.weight_bitmask"]
        mask[0, 0] = mask[0, 0] ^ 1

    rewrite(tmp_path, flip)
    refuses(tmp_path, re.escape(f"{LAYER}.weight_bitmask"), r"marks \d+ kept weights.*holds \d+")


def test_an_index_out_of_range_is_refused(tiny, tmp_path):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", pattern="2:4"))
    tiny.save_pretrained(tmp_path)

    def break_index(tensors):
        tensors[f"{LAYER}.weight_indices"][3, 1] = 255  # three bits of it are a 7, 2:4 has 0 to 5

    rewrite(tmp_path, break_index)
    refuses(tmp_path, re.escape(f"{LAYER}.weight_indices"), "index 7, out of range")


def test_a_wrong_shape_is_refused(checkpoint):
    folder, _ = checkpoint

    def cut(tensors):
        for key in tensors:
            if key.startswith(f"{LAYER}.weight_"):
                tensors[key] = tensors[key][:-1].contiguous()

    rewrite(folder, cut)
    refuses(folder, re.escape(f"{LAYER}.weight_"), r"has shape \(39, \d\), expected \(40, \d\)")


@pytest.mark.parametrize("half", ["values", "companion"])
def test_a_missing_half_is_refused(checkpoint, half):
    folder, _ = checkpoint

    def drop(tensors):
        keys = [key for key in tensors if key.startswith(f"{LAYER}.weight")]
        del tensors[next(k for k in keys if (k == f"{LAYER}.weight") == (half == "values"))]

    rewrite(folder, drop)
    refuses(folder, re.escape(LAYER), "is missing")


def test_a_wrong_dtype_is_refused(checkpoint):
    folder, _ = checkpoint

    def cast(tensors):
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.int16)

    rewrite(folder, cast)
    refuses(folder, re.escape(f"{LAYER}.weight has dtype torch.int16"))


@pytest.mark.parametrize("version", [2, "1", None, [1]])
def test_an_unknown_format_version_is_refused(checkpoint, version):
    folder, _ = checkpoint
    rewrite(folder, change_metadata=lambda content: {**content, "version": version})
    refuses(folder, re.escape(f"version {version!r} is not known"), "reads version 1")


def with_entry(**changes):
    def change(content):
        content["layers"][LAYER] |= changes

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_entry(format="os.system"), "storage format 'os.system' is not known"),
        (with_entry(shape=[40, 2**40]), r"shape \[40, 1099511627776\] is not \[out, in\]"),
        (with_entry(shape=[40, -24]), "is not"),
        (with_entry(shape=[40, True]), "is not"),
        (with_entry(shape="40"), "is not"),
        (with_entry(n=3, m=2), "n|no parameters"),
        (with_entry(surprise=1), "surprise"),
        (with_entry(transposed=True), "is packed from shape"),
        (lambda content: {"version": 1, "layers": []}, "no object 'layers'"),
        (lambda content: "{not json", "not JSON"),
        (lambda content: "[" * 5000, "not JSON .* nested too deep"),
        (lambda content: '{"version":' + "1" * 5000 + "}", "not JSON"),
        (lambda content: '{"version":1' + "0" * 400 + "}", "a number of many digits"),
        (lambda content: "[]", "version None"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(checkpoint, change, words):
    folder, _ = checkpoint
    rewrite(folder, change_metadata=change)
    refuses(folder, words)


def test_a_checkpoint_without_sparse_metadata_is_refused(checkpoint):
    folder, _ = checkpoint
    path = folder / "model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    refuses(folder, "no hf_sparse metadata")


def test_a_layer_of_another_shape_than_the_models_is_refused(checkpoint):
    folder, _ = checkpoint
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 44
    (folder / "config.json").write_text(json.dumps(config))
    refuses(folder, "is packed from shape", r"Linear with weight \(24, 44\)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_nothing_is_changed(tiny, token_ids, value):
    tiny.model.layers[1].mlp.down_proj.weight.data[3, 4] = value
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    with pytest.raises(SolveError, match=r"model\.layers\.1\.mlp\.down_proj.*NaN or infinite"):
        hf_sparse.prune(tiny, SparseConfig(dataset=list(token_ids)))
    after = tiny.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) or "down_proj" in k for k, v in before.items())


def test_activations_that_are_not_finite_are_named(tiny, token_ids):
    tiny.model.layers[0].post_attention_layernorm.weight.data.fill_(float("nan"))
    with pytest.raises(SolveError, match=r"model\.layers\.0\.mlp\.gate_proj.*NaN or infinite"):
        hf_sparse.prune(tiny, SparseConfig(dataset=list(token_ids)))


def test_dead_inputs_are_no_error(tiny, token_ids):
    tiny.model.layers[0].input_layernorm.weight.data[:20] = 0
    report = hf_sparse.prune(tiny, SparseConfig(dataset=list(token_ids)))
    assert report.sparsity == 0.5
    assert all(layer.relative_error < 1 for layer in report.layers)


def test_fewer_tokens_than_inputs_are_no_error(tiny, token_ids):
    report = hf_sparse.prune(tiny, SparseConfig(dataset=[token_ids[0][:4]], num_samples=1))
    assert report.sparsity == 0.5


class Branching(torch.nn.Module):
    """Two layers; only one of them is used."""

    def __init__(self):
        super().__init__()
        self.used = torch.nn.Linear(8, 8)
        self.unused = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_the_model_never_calls_stays_dense_and_is_named(caplog):
    data = [{"x": torch.randn(4, 8)}]
    model = Branching()
    report = hf_sparse.prune(model, SparseConfig(dataset=data))
    assert [layer.name for layer in report.layers] == ["used"]
    assert report.left_dense == {"unused": "no calibration token reached it"}
    assert type(model.unused) is torch.nn.Linear
    with pytest.raises(
        CalibrationError, match=r"no calibration token reached it: unused.*no other layer"
    ):
        hf_sparse.prune(Branching(), SparseConfig(dataset=data, targets=["unused"]))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ConfigError, "method='sparsegpt' needs calibration data: pass dataset="),
        ({"dataset": []}, CalibrationError, "is empty"),
        ({"dataset": [torch.tensor([3, 61])]}, CalibrationError, "token id 61.*vocabulary has 61"),
        ({"dataset": [torch.tensor([-1, 5])]}, CalibrationError, "token id -1"),
        ({"dataset": "missing.txt"}, CalibrationError, "missing.txt.*no such file"),
        ({"dataset": ["text"]}, CalibrationError, "text, and no tokenizer"),
        ({"dataset": [[3, 4]], "seq_len": 65}, ConfigError, "seq_len=65 is longer than the 64"),
        ({"dataset": [[3, 4]], "targets": ["up_prok"]}, TargetError, "near names: up_proj"),
        ({"dataset": [[3, 4]], "sparsity": {"w1": 0.5}}, TargetError, "'w1' matches no linear"),
    ],
)
def test_mistakes_are_reported_before_the_model_is_touched(tiny, arguments, error, words):
    with pytest.raises(error, match=words):
        hf_sparse.prune(tiny, SparseConfig(**arguments))
    assert getattr(tiny, "hf_quantizer", None) is None
    assert not any(isinstance(m, hf_sparse.SparseLinear) for m in tiny.modules())


def test_missing_data_are_noticed_before_a_model_is_loaded(tmp_path, tiny):
    tiny.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # it would be missed, were it looked for
    with pytest.raises(ConfigError, match="needs calibration data"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SparseConfig())


def test_a_tied_weight_can_not_be_targeted(trained):
    with pytest.raises(TargetError, match=r"lm_head can't be pruned: its weight is tied"):
        hf_sparse.prune(trained, SparseConfig(method="magnitude", targets=["lm_head"]))


def test_pruning_twice_is_refused(tiny):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude"))
    with pytest.raises(ConfigError, match=r"already: call model\.dequantize\(\) first"):
        hf_sparse.prune(tiny, SparseConfig(method="magnitude"))
