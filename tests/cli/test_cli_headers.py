"""Headers tell what is stored; damaged ones are refused, never believed."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hf_sparse
from hf_sparse import SparseConfig
from hf_sparse_cli.failures import Failure
from hf_sparse_cli.headers import read_headers

LAYER = "model.layers.0.mlp.up_proj"


def saved(model, folder, shards="50GB", **arguments):
    report = hf_sparse.prune(model, SparseConfig(method="magnitude", **arguments))
    model.save_pretrained(folder, max_shard_size=shards)
    return report


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_headers_tell_what_was_written(tiny, tmp_path, pattern):
    report = saved(tiny, tmp_path, "8KB", pattern=pattern)
    found = read_headers(str(tmp_path), None, {})
    files = list(tmp_path.glob("*.safetensors"))
    tensors = {key: value for file in files for key, value in load_file(file).items()}
    assert found.files == len(files) > 1
    assert found.tensors == len(tensors)
    assert found.bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    expected = {
        layer.name: (layer.shape, layer.sparsity, layer.bytes_after, layer.bytes_before)
        for layer in report.layers
    }
    assert {
        layer.name: (layer.shape, layer.sparsity, layer.bytes, layer.bytes_dense)
        for layer in found.layers
    } == expected
    assert {layer.format for layer in found.layers} == (
        {"bitmask"} if pattern == "unstructured" else {"n:m, m 4, n 2"}
    )


def test_values_that_are_no_floats_have_an_unknown_sparsity(tiny, tmp_path):
    saved(tiny, tmp_path)
    rewrite(tmp_path, lambda t: t.update({f"{LAYER}.weight": torch.zeros(9, dtype=torch.uint8)}))
    (layer,) = (x for x in read_headers(str(tmp_path), None, {}).layers if x.name == LAYER)
    assert (layer.sparsity, layer.bytes_dense, layer.dtype) == (None, None, "U8")


def rewrite(folder, change=lambda tensors: None, change_metadata=lambda content: content):
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        content = change_metadata(json.loads(file.metadata()["hf_sparse"]))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"hf_sparse": json.dumps(content)})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["hf_sparse_save"]  # what a user does who meant the change
    (folder / "config.json").write_text(json.dumps(config))


def entry(**changes):
    def change(content):
        content["layers"][LAYER] = {**content["layers"][LAYER], **changes}
        return content

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (entry(shape=[40]), f"what it stores of {LAYER} is damaged"),
        (entry(shape=["a", 24]), "is damaged"),
        (entry(shape=[0, 24]), "is damaged"),
        (entry(shape=[True, None]), "is damaged"),
        (lambda c: {**c, "version": 9}, "version 9 is not known, this hf_sparse reads version 1"),
        (lambda c: [c], "version None is not known"),
        (lambda c: {"version": 10**400}, "metadata is not JSON .* a number is beyond"),
        (lambda c: {"version": float("nan")}, "metadata is not JSON"),
        (lambda c: {"version": 1, "layers": [1]}, "have no object 'layers'"),
        (lambda c: {"version": 1, "layers": {LAYER: 3}}, "have no object 'layers'"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(tiny, tmp_path, change, words):
    saved(tiny, tmp_path)
    rewrite(tmp_path, change_metadata=change)
    with pytest.raises(Failure, match=words):
        read_headers(str(tmp_path), None, {})


def test_a_layer_without_its_values_is_refused(tiny, tmp_path):
    saved(tiny, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(f"{LAYER}.weight"))
    with pytest.raises(Failure, match=f"{LAYER} is damaged or incomplete"):
        read_headers(str(tmp_path), None, {})


@pytest.mark.parametrize(
    "content",
    [
        lambda old: old[:-100],
        lambda old: old[:500],
        lambda old: b"abc",
        lambda old: b"\xff" * 8 + old[8:],
        lambda old: old[:8] + b"!" + old[9:],
        lambda old: (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_a_damaged_file_is_refused(tiny, tmp_path, content):
    saved(tiny, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(Failure, match=r"model\.safetensors: it can't be read: "):
        read_headers(str(tmp_path), None, {})


def test_a_checkpoint_without_hf_sparse_metadata_is_refused(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    with pytest.raises(Failure, match="has no hf_sparse metadata"):
        read_headers(str(tmp_path), None, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(Failure, match=r"has no model\.safetensors"):
        read_headers(str(tmp_path), None, {})
