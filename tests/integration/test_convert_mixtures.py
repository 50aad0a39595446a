"""Mixtures that compressed-tensors wrote expert by expert, in this project's format.

tests/data/make_compressed_tensors.py made the checkpoints, with the weights that were put in. The
last of the three experts was not pruned.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM
from transformers.utils import logging

from conftest import ROOT
from hf_sparse import CheckpointError, SparseLinear, convert
from hf_sparse.layers import SparseExperts
from hf_sparse.layers.experts import is_fused

DATA = ROOT / "tests" / "data"
BITMASK, TWO_OF_FOUR = "mixtral-bitmask-0.8.1", "mixtral-24-0.14.0.1"
every_folder = pytest.mark.parametrize("folder", [BITMASK, TWO_OF_FOUR])
EXPERTS = "model.layers.0.mlp.experts"
STORED = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable_progress_bar()


@pytest.fixture
def dense(tmp_path):
    """The weights that were put in, loaded by transformers."""

    def run(folder):
        target = tmp_path / "dense"
        shutil.copytree(DATA / folder, target)
        (target / "dense.safetensors").rename(target / "model.safetensors")
        config = json.loads((target / "config.json").read_text())
        del config["quantization_config"]
        (target / "config.json").write_text(json.dumps(config))
        # torch's grouped products want sides that are multiples of 8.
        settings = {"dtype": "auto", "experts_implementation": "eager"}
        return AutoModelForCausalLM.from_pretrained(target, **settings)

    return run


@pytest.fixture
def tampered(tmp_path):
    """A copy of a checkpoint with other tensors; `change` edits them in place."""

    def run(folder, change):
        target = tmp_path / "source"
        shutil.copytree(DATA / folder, target, ignore=shutil.ignore_patterns("dense.*"))
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors")
        return target

    return run


def assert_same_weights(model, expected):
    """Dense again, a model has the weights of another to the bit, but for signs of zeros."""
    found, wanted = model.dequantize().state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@every_folder
def test_experts_are_sparse_layers_with_the_weights_that_were_put_in(folder, dense, tmp_path):
    done = convert(DATA / folder, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    packed = {name for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    assert set(done.layers) == packed
    experts = {name for name in packed if "experts" in name}
    assert experts == {
        f"{EXPERTS}.{expert}.{part}" for expert in (0, 1) for part in ("gate_up_proj", "down_proj")
    }
    attention = {name for name in packed if "self_attn" in name}
    assert len(attention) == 4
    assert packed == experts | attention
    # Embedding, head, router, three norms, and two layers of the expert that is dense.
    assert done.dense == 8
    expected = dense(folder)
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        # Tokens of an expert are added up in another order.
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-2, atol=1e-3)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert sum(isinstance(m, SparseLinear) for m in again.modules()) == len(packed)
    assert_same_weights(model, expected)


def test_experts_are_the_same_in_many_files(dense, tmp_path):
    convert(DATA / BITMASK, tmp_path / "out", max_shard_size=500)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert_same_weights(model, dense(BITMASK))


@pytest.mark.parametrize("stored", ["plain", "in parts"])
def test_experts_of_which_none_gets_smaller_stay_fused(stored, dense, tampered, tmp_path):
    full = {name: t for name, t in dense(BITMASK).state_dict().items() if "experts" in name}
    full = {name: torch.where(t == 0, torch.ones_like(t), t) for name, t in full.items()}

    def change(tensors):
        for expert in range(3):
            gate, up = full[f"{EXPERTS}.gate_up_proj"][expert].chunk(2)
            down = full[f"{EXPERTS}.down_proj"][expert]
            for name, weight in (("w1", gate), ("w2", down), ("w3", up)):
                key = f"{STORED}.{expert}.{name}.weight"
                for part in ("compressed", "bitmask", "row_offsets", "shape"):
                    del tensors[f"{key}.{part}"]
                if stored == "plain":
                    tensors[key] = weight.contiguous()
                    continue
                rows, columns = weight.shape
                bits = torch.tensor([255, 2 ** (columns - 8) - 1], dtype=torch.uint8)
                tensors[f"{key}.compressed"] = weight.flatten().contiguous()
                tensors[f"{key}.bitmask"] = bits.repeat(rows, 1)
                tensors[f"{key}.row_offsets"] = torch.arange(rows) * columns
                tensors[f"{key}.shape"] = torch.tensor([rows, columns])

    source = tampered(BITMASK, change)
    done = convert(source, tmp_path / "out")
    assert not any("experts" in name for name in done.layers)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    experts = model.get_submodule(EXPERTS)
    assert is_fused(experts)
    assert not isinstance(experts, SparseExperts)
    for name, weight in full.items():
        assert torch.equal(model.state_dict()[name], weight)


@pytest.mark.parametrize("both", [True, False], ids=["stored twice", "stored once"])
def test_tied_experts_are_stored_dense_and_once(both, dense, tampered, monkeypatch, tmp_path):
    """A second block that is like the first, whose experts it shares."""
    expected = dense(BITMASK).state_dict()
    ties = {"model.layers.1.mlp.experts": "model.layers.0.mlp.experts"}
    monkeypatch.setattr(MixtralForCausalLM, "_tied_weights_keys", ties)

    def change(tensors):
        for name in [name for name in tensors if "layers.0." in name]:
            if both or "experts" not in name:
                tensors[name.replace("layers.0.", "layers.1.")] = tensors[name].clone()

    source = tampered(BITMASK, change)
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    done = convert(source, tmp_path / "out")
    assert len(done.layers) == 8
    assert not any("experts" in name for name in done.layers)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    experts = {name for name in stored if "experts" in name}
    assert experts == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name in experts:
        weight = model.get_parameter(name)
        assert model.get_parameter(name.replace("layers.0.", "layers.1.")) is weight
        assert torch.equal(weight, expected[name])


def drop(key):
    def change(tensors):
        for name in [name for name in tensors if name.startswith(key)]:
            del tensors[name]

    return change


def cut(tensors):
    tensors[f"{STORED}.2.w3.weight"] = torch.zeros(14, 10, dtype=torch.bfloat16)


def cast(tensors):
    key = f"{STORED}.2.w3.weight"
    tensors[key] = tensors[key].float()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(f"{STORED}.1.w3"), rf"{EXPERTS}\.1\.gate_up_proj\.weight, whose other part no file"),
        (drop(f"{STORED}.1.w2"), rf"source: no file has {EXPERTS}\.1\.down_proj\.weight"),
        (cut, r"2\.w3\.weight is BF16 of a weight of shape \(14, 10\), which doesn't fit .*2\.w1"),
        (cast, r"2\.w3\.weight is F32 of .*, which doesn't fit .*2\.w1\.weight, BF16"),
        (
            lambda tensors: tensors.update({f"{STORED}.3.w2.weight": torch.zeros(12, 14)}),
            r"experts\.3\.w2\.weight is of no parameter of MixtralForCausalLM",
        ),
    ],
    ids=["part", "layer", "shape", "dtype", "more"],
)
def test_experts_that_do_not_fit_are_refused(change, words, tampered, tmp_path):
    source = tampered(TWO_OF_FOUR, change)
    with pytest.raises(CheckpointError, match=words):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
