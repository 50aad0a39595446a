"""A config.json with numbers of which no model is made is refused at once, with the number."""

import json
from contextlib import nullcontext
from functools import partial

import pytest
from tiny_models import DECODER, MIXTURE, tiny_bert
from transformers import BertForMaskedLM, LlamaConfig, MixtralConfig, Qwen3Config

import hf_sparse.checkpoint.config_numbers as numbers
from hf_sparse import CheckpointError, SparseConfig, estimate, prune_checkpoint

MAGNITUDE = SparseConfig(method="magnitude")
look = partial(estimate, config=MAGNITUDE, measure=False)


def saved(config, cls, folder, **changes):
    content = json.loads(config.to_json_string(use_diff=False)) | changes
    folder.mkdir(exist_ok=True)
    content |= {"architectures": [cls], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_numbers_out_of_the_question_are_named(tmp_path):
    for key, number, told in (
        ("num_hidden_layers", 10**9, "1000000000, expected at most 20000"),
        ("num_hidden_layers", -1, "-1, expected at least 0"),
        ("vocab_size", 10**12, "1000000000000, expected at most 2147483647"),
        ("vocab_size", 10**400, r"expected at most 2147483647"),
        ("hidden_size", 0, "0, expected at least 1"),
        ("hidden_size", -8, "-8, expected at least 1"),
        ("intermediate_size", 10**11, "expected at most"),
        ("num_local_experts", 10**12, "expected at most"),
        ("head_dim", 10**11, "expected at most"),
        ("num_attention_heads", 0, "0, expected at least 1"),
    ):
        # A config that makes a list of its layers, before there is a model, and one that doesn't.
        for config, cls in ((LlamaConfig, "LlamaForCausalLM"), (Qwen3Config, "Qwen3ForCausalLM")):
            content = {"layer_types": None, key: number}
            folder = saved(config(**DECODER), cls, tmp_path, **content)
            with pytest.raises(CheckpointError, match=f"config.json has {key} .*{told}"):
                look(folder)


def test_numbers_in_a_config_within_a_config_are_named(tmp_path):
    content = {"vision_config": {"depth": 10**9}}
    folder = saved(LlamaConfig(**DECODER), "LlamaForCausalLM", tmp_path, **content)
    with pytest.raises(CheckpointError, match=r"config\.json has depth 1000000000"):
        look(folder)


def test_more_modules_than_any_model_has_are_noticed_as_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(numbers, "_MOST_MODULES", 1000)
    content = {"num_hidden_layers": 100, "layer_types": None}
    folder = saved(LlamaConfig(**DECODER), "LlamaForCausalLM", tmp_path, **content)
    with pytest.raises(CheckpointError, match="more than 1000 modules"):
        look(folder)


def test_experts_count_once_they_are_layers_and_none_are_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(numbers, "_MOST_MODULES", 1000)
    for number, error in ((2000, CheckpointError), (0, None)):
        config = MixtralConfig(**MIXTURE, num_local_experts=number)
        folder = saved(config, "MixtralForCausalLM", tmp_path)
        with pytest.raises(error, match="more than 1000") if error else nullcontext():
            look(folder)


def test_buffers_that_do_not_fit_into_memory_are_told_before_they_are_made(tmp_path):
    source = tmp_path / "dense"
    model = tiny_bert(BertForMaskedLM)
    model.save_pretrained(source)
    content = {"max_position_embeddings": 2**31 - 1, "hidden_size": 24}
    saved(model.config, "BertForMaskedLM", source, **content)
    assert look(source).bytes_read > 2**31
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        free = type("Free", (), {"available": 10**9})
        patched.setattr("psutil.virtual_memory", lambda: free)
        with pytest.raises(CheckpointError, match=r"position_ids has the shape \(1, 2147483647\)"):
            prune_checkpoint(source, MAGNITUDE, tmp_path / "out")
    assert not (tmp_path / "out").exists()
