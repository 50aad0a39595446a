"""Checkpoints that versions 0.6 to 0.14 of compressed-tensors wrote, in this project's format.

tests/data/make_compressed_tensors.py made them, with the weights that were put in.
"""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_sparse
from conftest import ROOT
from hf_sparse import CheckpointError, ConfigError, SaveError, SparseLinear, convert
from hf_sparse.checkpoint.weight_files import GUARD

DATA = ROOT / "tests" / "data"
FOLDERS = ["bitmask-0.6.0", "bitmask-0.8.1", "gpt2-bitmask-0.8.1", "bitmask-0.14.0.1", "24-0.9.4",
           "24-0.14.0.1"]  # fmt: skip
QUANTISED = DATA / "quantised-24-0.14.0.1"
every_folder = pytest.mark.parametrize("folder", FOLDERS)


@pytest.fixture
def copy(tmp_path):
    """Copies one of the checkpoints, to be tampered with; without the dense weights."""

    def run(folder):
        target = tmp_path / "source"
        shutil.copytree(DATA / folder, target, ignore=shutil.ignore_patterns("dense.*"))
        return target

    return run


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def tensors_of(folder):
    return {k: v for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()}


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_fails(folder, tmp_path, words, error=CheckpointError):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=words):
        convert(folder, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


# --- what comes out -------------------------------------------------------------------------


@every_folder
def test_every_weight_is_what_was_put_in_to_the_bit(folder, tmp_path):
    done = convert(DATA / folder, tmp_path / "out")
    expected = load_file(DATA / folder / "dense.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            transposed = isinstance(module, SparseLinear) and module.axes.transposed
            found[f"{name}.weight"] = weight.T if transposed else weight
        if getattr(module, "bias", None) is not None:
            found[f"{name}.bias"] = module.bias
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert found[key].dtype == weight.dtype, key
        # The library itself stored no sign of a zero.
        assert torch.equal(bits(found[key].detach().contiguous() + 0.0), bits(weight + 0.0)), key
    assert set(done.layers) == {n for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    tied = model.config.tie_word_embeddings
    assert len(done.layers) == (4 if tied else 7)
    assert done.dense == len(expected) - len(done.layers) - tied


@every_folder
def test_logits_are_the_dense_models(folder, tmp_path):
    convert(DATA / folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    del config.quantization_config
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    dense.load_state_dict(load_file(DATA / folder / "dense.safetensors"))
    ids = torch.arange(14).view(2, 7) % 11
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-6)


def test_two_of_four_is_stored_as_n_m_unless_fours_run_across_rows(tmp_path):
    done = convert(DATA / "24-0.14.0.1", tmp_path / "out")
    other = {name: label for name, label in done.layers.items() if label != "n:m"}
    assert other == {"model.layers.0.mlp.down_proj": "bitmask"}
    done = convert(DATA / "bitmask-0.8.1", tmp_path / "out")
    assert set(done.layers.values()) == {"bitmask"}


@every_folder
def test_the_config_keeps_the_model_and_loses_the_old_format(folder, tmp_path):
    convert(DATA / folder, tmp_path)
    old, new = (json.loads((f / "config.json").read_text()) for f in (DATA / folder, tmp_path))
    made = new.pop("quantization_config")
    del made["hf_sparse_save"]
    assert new.pop("transformers_weights") == GUARD
    assert made == hf_sparse.SparseConfig(method="keep").to_dict()
    for key in ("quantization_config", "compression_config"):
        old.pop(key, None)
    assert new == old
    for file in tmp_path.iterdir():
        assert b"compressed" not in file.read_bytes()


def test_shards_are_of_the_size_asked_for_and_the_same_tensors(tmp_path):
    source = DATA / "bitmask-0.14.0.1"
    one = convert(source, tmp_path / "one")
    several = convert(source, tmp_path / "several", max_shard_size=1000)
    assert (one.layers, one.dense) == (several.layers, several.dense)
    assert [p.name for p in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    first, second = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "several")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in first.values())
    headers = set()
    for file in (tmp_path / "several").glob("*.safetensors"):
        assert {k for k, f in index["weight_map"].items() if f == file.name} == set(load_file(file))
        assert sum(t.nbytes for t in load_file(file).values()) <= 1000
        with safe_open(file, framework="pt") as opened:
            headers.add(opened.metadata()["hf_sparse"])
    assert len(headers) == 1
    assert len(set(index["weight_map"].values())) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "several")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_no_more_than_a_shard_is_held_at_once(tmp_path, monkeypatch):
    from hf_sparse.checkpoint.compressed_tensors import write

    written = []
    save = write.save_file
    monkeypatch.setattr(
        write, "save_file", lambda tensors, *a: (written.append(len(tensors)), save(tensors, *a))
    )
    convert(DATA / "24-0.9.4", tmp_path / "out", max_shard_size=1)
    assert len(written) == 16  # one parameter a file, in two tensors if it is packed
    assert max(written) == 2


def test_the_other_files_come_along_and_other_weights_do_not(copy, tmp_path):
    source = copy("24-0.14.0.1")
    tokenizer = ROOT / "examples" / "models" / "tiny-llama-docs"
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(source)
    (source / "templates").mkdir()
    for name in ("README.md", "templates/a.jinja", "pytorch_model.bin", ".gitattributes"):
        (source / name).write_text(name)
    convert(source, tmp_path / "out")
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert found >= {"generation_config.json", "README.md", "templates/a.jinja"}
    assert not found & {"pytorch_model.bin", ".gitattributes"}
    assert (tmp_path / "out" / "templates" / "a.jinja").read_text() == "templates/a.jinja"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the text").input_ids


def test_a_tied_head_is_not_stored_twice_and_old_buffers_are_dropped(copy, tmp_path):
    source = copy("24-0.14.0.1")
    edit_config(source, tie_word_embeddings=True)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    edit_tensors(source, change)
    convert(source, tmp_path / "out")
    stored = tensors_of(tmp_path / "out")
    assert not {k for k in stored if "lm_head" in k or "inv_freq" in k}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("key", ["sparsity_config", "compression_config"])
def test_the_places_where_early_versions_put_their_config_are_known(key, copy, tmp_path):
    source = copy("bitmask-0.8.1")
    described = json.loads((source / "config.json").read_text())["quantization_config"]
    described = {"sparsity_config": described["sparsity_config"]}
    described = described["sparsity_config"] if key == "sparsity_config" else described
    edit_config(source, quantization_config=None, **{key: described})
    convert(source, tmp_path / "out")
    assert key not in json.loads((tmp_path / "out" / "config.json").read_text())


# --- what is refused ------------------------------------------------------------------------


def test_a_source_of_another_kind_is_refused_in_one_sentence(copy, tmp_path, model_path):
    assert_fails(model_path, tmp_path, "tiny-llama-docs is dense: .*method='keep'")
    assert_fails(QUANTISED, tmp_path, "more than sparse: its config_groups .*'int-quantized'")
    assert_fails(tmp_path / "none", tmp_path, "none has no config.json")
    convert(DATA / "24-0.9.4", tmp_path / "ours")
    assert_fails(tmp_path / "ours", tmp_path, "ours is in hf_sparse's own format already")
    source = copy("24-0.9.4")
    for described, words in (
        ({"quant_method": "gptq"}, "source is quantised with 'gptq'"),
        ({"sparsity_config": {"format": "dense"}}, "format 'dense': convert reads sparse-bitmask"),
        ({"sparsity_config": {"format": ["x"]}}, "format "),
        ({"sparsity_config": 3}, "format None"),
        ("text", "is dense"),
        ({"transform_config": {"x": 1}, "sparsity_config": {}}, "its transform_config says"),
    ):
        edit_config(source, quantization_config=described)
        assert_fails(source, tmp_path, words)


def test_codes_are_refused_also_if_the_config_hides_them(copy, tmp_path):
    source = copy(QUANTISED.name)
    config = json.loads((DATA / "24-0.9.4" / "config.json").read_text())
    edit_config(source, quantization_config=config["quantization_config"])
    assert_fails(source, tmp_path, r"model.safetensors: model\S+compressed is I8: quantised")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "unheard"}, "no model type 'unheard'"),
        ({"model_type": ["llama"]}, "no model type"),
        ({"architectures": ["os.system"]}, "no 'llama' model called .*os.system"),
        ({"architectures": 3}, "model (called|in config.json)"),
        ({"hidden_size": "x"}, "can't build the model in config.json"),
        ({"hidden_size": 24}, r"model.safetensors: \S+ is of a weight of shape .*24"),
        ({"num_hidden_layers": 2}, r"source: no file has model\.layers\.1\."),
        ({"attention_bias": False}, r"proj\.bias is of no parameter of LlamaForCausalLM"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, words, copy, tmp_path):
    source = copy("24-0.9.4")
    edit_config(source, **changes)
    assert_fails(source, tmp_path, words)


def test_a_weight_that_is_stored_twice_is_refused(copy, tmp_path):
    source = copy("24-0.9.4")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(source, lambda tensors: tensors.update({name: torch.zeros(14, 12)}))
    assert_fails(
        source, tmp_path, r"model\.safetensors: \S+up_proj\S* is a second \S+up_proj\.weight"
    )


def test_models_whose_weights_transformers_splits_are_refused(copy, tmp_path):
    source = copy("24-0.9.4")
    edit_config(source, model_type="nomic_bert", architectures=["NomicBertModel"])

    def change(tensors):
        tensors.clear()
        tensors["encoder.layers.0.attn.Wqkv.weight"] = torch.zeros(36, 12)

    edit_tensors(source, change)
    assert_fails(source, tmp_path, r"attn\.Wqkv\.weight is one of several weights that")


def test_a_target_in_the_source_or_a_size_that_is_none_is_refused(copy, tmp_path):
    source = copy("24-0.9.4")
    before = {path: path.read_bytes() for path in source.iterdir()}
    for target in (source, source / "out"):
        with pytest.raises(SaveError, match="it is in the source, pass another folder"):
            convert(source, target)
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    with pytest.raises(ConfigError, match="max_shard_size='many' is no size"):
        convert(source, tmp_path / "out", max_shard_size="many")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    from hf_sparse.checkpoint.compressed_tensors import write

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "save_file", full)
    assert_fails(DATA / "24-0.9.4", tmp_path, "No space left", SaveError)


# --- the command ----------------------------------------------------------------------------


def test_the_command_says_what_it_made(cli, tmp_path):
    out = tmp_path / "out"
    code, said, _ = cli("convert", DATA / "24-0.9.4", "--output", out)
    assert code == 0
    assert re.match(r"7 layers packed \(.*6 n:m.*\), 9 parameters dense; 0.01 MB before", said)
    code, said, _ = cli(
        "convert", DATA / "24-0.9.4", "--output", out, "--max-shard-size", "1KB", "--json",
        "--overwrite",
    )  # fmt: skip
    values = json.loads(said)
    assert values["layers"]["model.layers.0.mlp.up_proj"] == "n:m"
    assert values["bytes_after"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert cli("inspect", out)[0] == 0


def test_the_command_fails_in_one_sentence(cli, tmp_path):
    for source, words in (
        (QUANTISED, "is more than sparse: its config_groups says"),
        ("someone/nothing", "no folder someone/nothing, and from the Hub"),
    ):
        code, _, said = cli("convert", source, "--output", tmp_path / "out")
        assert code == 1
        assert words in said
        assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable_progress_bar()
