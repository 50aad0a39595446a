"""Files that contradict each other, and contents that are used before they are checked."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import hf_sparse
from conftest import ROOT
from hf_sparse import CheckpointError, SaveError, SparseConfig
from hf_sparse.checkpoint.compressed_tensors import convert, write
from hf_sparse.checkpoint.folder import write_folder

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama(num_hidden_layers=1)
    hf_sparse.prune(model, SparseConfig(method="magnitude", pattern="2:4"))
    model.save_pretrained(tmp_path / "model", max_shard_size="8KB")
    return tmp_path / "model"


def edit(path, change):
    """Write a file again after `change(tensors, layers)`."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, content = load_file(path), json.loads(metadata["hf_sparse"])
    change(tensors, content["layers"])
    save_file(tensors, path, metadata | {"hf_sparse": json.dumps(content)})


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def holding(folder, key):
    return next(path for path in shards(folder) if key in load_file(path))


def refused(folder, words):
    with pytest.raises(CheckpointError, match=words):
        AutoModelForCausalLM.from_pretrained(folder)


def test_one_module_under_two_names_is_refused(folder):
    alias = LAYER.removeprefix("model.")

    def change(tensors, layers):
        layers[alias] = {"format": "n:m", "n": 4, "m": 8, "shape": layers[LAYER]["shape"]}
        for key in [key for key in tensors if key.startswith(LAYER + ".")]:
            tensors[key.replace(LAYER, alias)] = tensors[key].clone()

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder)
    edit(folder / "model.safetensors", change)
    refused(folder, "one module, described twice")


def test_a_tensor_in_two_shards_is_refused(folder):
    key = f"{LAYER}.weight"
    path = holding(folder, key)
    other = next(shard for shard in shards(folder) if shard != path)
    values = load_file(path)[key]
    edit(other, lambda tensors, layers: tensors.update({key: values + 1}))
    first, second = sorted([path, other])
    refused(folder, f"{second.name}: {re.escape(key)} is in .*{first.name}, too")


def test_shards_that_describe_different_layers_are_refused(folder):
    edit(shards(folder)[1], lambda tensors, layers: layers[LAYER].update(n=1))
    refused(folder, "00002-of.*metadata differ from .*00001-of")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_refused(folder, value):
    def change(tensors, layers):
        tensors[f"{LAYER}.weight"][1, 1] = value

    path = holding(folder, f"{LAYER}.weight")
    edit(path, change)
    refused(folder, f"{path.name}: {LAYER}.weight holds NaN or infinite values")


@pytest.mark.parametrize("layer", ["mlp.c_proj", "attn.c_proj", "attn.c_attn"])
def test_what_a_models_initialisation_reads_is_checked_before(tmp_path, layer):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    hf_sparse.prune(model, SparseConfig(method="magnitude", format="bitmask"))
    model.save_pretrained(tmp_path)
    name = f"transformer.h.0.{layer}.weight_bitmask"
    edit(tmp_path / "model.safetensors", lambda tensors, layers: tensors[name].fill_(255))
    refused(tmp_path, rf"model\.safetensors: {name} marks")


def test_conversion_copies_no_link_that_leads_out_of_the_folder(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(write.logger, "warning", lambda *args: said.append(args[1]))
    source = tmp_path / "source"
    source.mkdir()
    for path in (ROOT / "tests" / "data" / "24-0.9.4").iterdir():
        shutil.copy(path, source / path.name)
    (source / "dense.safetensors").unlink()
    (tmp_path / "secret").write_text("mine")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    (source / "notes.txt").write_text("notes")
    (source / "more.txt").symlink_to(source / "notes.txt")
    convert(source, tmp_path / "done")
    assert not (tmp_path / "done" / "tokenizer.json").exists()
    assert said == [str(source / "tokenizer.json")]
    assert (tmp_path / "done" / "more.txt").read_text() == "notes"


def test_conversion_copies_what_the_hubs_cache_links_to(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in (ROOT / "tests" / "data" / "24-0.9.4").glob("[!d]*"):
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    convert(snapshot, tmp_path / "done")
    assert (tmp_path / "done" / "generation_config.json").is_file()


def test_nothing_is_saved_through_a_link_in_the_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sub").symlink_to(tmp_path / "elsewhere")

    def save(folder):
        path = Path(folder) / "sub"
        path.mkdir()
        (path / "file.txt").write_text("new")

    with pytest.raises(SaveError, match=r"nothing was changed there: 'sub'.*link"):
        write_folder(tmp_path / "model", save)
    assert list((tmp_path / "elsewhere").iterdir()) == []
