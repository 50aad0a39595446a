"""What users may say of attention, and what models it is for."""

import json
import subprocess
import sys

import pytest
import torch
from attention_models import batch, make
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GitConfig,
    GitForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_sparse
from hf_sparse import AttentionSettings, CalibrationError, ConfigError, SparseConfig
from hf_sparse.layers.attention import interface
from hf_sparse.layers.attention.interface import states

SETTINGS = {"method": "hs_block", "block": 8, "key_block": 4, "keys": 16, "from_length": 4}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hs_blok", "did you mean 'hs_block'"),
        (7, "attention=7 must be a method"),
        ({"method": "sdpa"}, "attention method='sdpa' does not exist"),
        ({"method": ["hs_block"]}, "attention method=.* must be a name"),
        ({"keyz": 3}, "no setting 'keyz' .did you mean 'keys'"),
        ({"keys": 0}, "attention keys=0 must be an integer of at least 1"),
        ({"keys": True}, "attention keys=True must be an integer"),
        ({"block": 2.5}, "attention block=2.5 must be an integer"),
        ({"from_length": -1}, "attention from_length=-1 must be"),
        ({"seed": 2**31}, "attention seed=2147483648 must be .* at most 2147483647"),
        ({"keys": 2**31}, "attention keys=2147483648 must be .* at most 2147483647"),
        ({"from_length": 2**31}, "attention from_length=2147483648 .* at most 2147483647"),
        ({"block": 2**31 - 1}, "attention block=2147483647 must be .* at most 65536"),
        ({"key_block": 2**31 - 1}, "attention key_block=2147483647 must be .* at most 65536"),
        ({"features": 2**31 - 1}, "attention features=2147483647 must be .* at most 65536"),
        ({"selector": "blok"}, "did you mean 'block'"),
        ({"residual": "centroid"}, "did you mean 'centroids'"),
    ],
)
def test_wrong_settings_are_named(given, message):
    for ask in (
        lambda: SparseConfig(sparsity=0, method="magnitude", attention=given),
        lambda: hf_sparse.use_attention(make("llama"), given),
    ):
        with pytest.raises(ConfigError, match=message):
            ask()


def test_settings_that_are_made_by_hand_are_checked_too():
    with pytest.raises(ConfigError, match=r"attention method=.'x'. must be a name"):
        AttentionSettings(["x"])
    with pytest.raises(ConfigError, match="attention residual=3 must be a name"):
        AttentionSettings(residual=3)


def biased():
    sizes = {"vocab_size": 50, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    return BloomForCausalLM(BloomConfig(**sizes))


def capped():
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        )
    )  # fmt: skip


def relative():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    )


@pytest.mark.parametrize("model", [biased, capped, relative])
def test_a_model_whose_scores_have_more_in_them_is_refused_and_stays_as_it_is(model):
    model = model().eval()
    before = model.config._attn_implementation
    for ask in (
        lambda: hf_sparse.use_attention(model, "hs_block"),
        lambda: hf_sparse.prune(
            model, SparseConfig(method="magnitude", sparsity=0.5, attention="hs_block")
        ),
    ):
        with pytest.raises(ConfigError, match="hs_block"):
            ask()
    assert model.config._attn_implementation == before
    assert not any(isinstance(m, hf_sparse.SparseLinear) for m in model.modules())


def test_soft_caps_are_an_error_without_a_check_before(monkeypatch):
    model = capped().eval()
    model.set_attn_implementation("hs_block")
    with pytest.raises(ConfigError, match="soft caps"):
        model(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("s_aux", torch.zeros(4), "attention sinks"),
        ("sinks", torch.zeros(4), "attention sinks"),
        ("block_indices", torch.zeros(1, 1, 40, 2), "keys that it picks itself"),
        ("indices", torch.zeros(1, 40, 2), "keys that it picks itself"),
        ("relative_bias", torch.zeros(4), "an argument 'relative_bias' of its own"),
        ("temperature", 0.5, "an argument 'temperature' of its own"),
    ],
)
@pytest.mark.parametrize("length", [1, 40])
def test_what_else_changes_scores_is_never_ignored(name, value, message, length):
    query = torch.randn(1, 4, length, 8)
    module = make("llama").model.layers[0].self_attn
    with pytest.raises(ConfigError, match=message):
        interface.attention(module, query, query, query, None, method="hs_block", **{name: value})


def test_sinks_are_an_error_before_anything_is_changed():
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=2)).eval()
    before = model.config._attn_implementation
    with pytest.raises(ConfigError, match="attention sinks"):
        hf_sparse.use_attention(model, "hs_block")
    assert model.config._attn_implementation == before


def test_a_model_that_reads_the_mask_itself_is_refused():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = GitConfig(vision_config=vision, **sizes, num_attention_heads=4)
    with pytest.raises(ConfigError, match=r"GitForCausalLM .* reads or changes the mask itself"):
        hf_sparse.use_attention(GitForCausalLM(config).eval(), "hs_block")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_data_parallel_model_has_it_and_a_compiled_one_says_that_it_can_not():
    model = make("llama")
    hf_sparse.use_attention(torch.nn.DataParallel(model), SETTINGS)
    assert model.config._attn_implementation == "hs_block"
    with pytest.raises(ConfigError, match=r"exact under torch\.compile"):
        hf_sparse.use_attention(torch.compile(model), SETTINGS)
    hf_sparse.use_attention(torch.compile(model), None)
    assert model.config._attn_implementation == "sdpa"


def test_attention_is_for_models_of_transformers():
    with pytest.raises(ConfigError, match="models of transformers, found Sequential"):
        hf_sparse.use_attention(torch.nn.Sequential(), "hs_block")


@torch.no_grad()
def logits(model):
    inputs, _ = batch("left", "llama")
    return model(**inputs).logits


@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_a_model_is_saved_with_its_attention(tmp_path, sparsity):
    make("llama").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense",
        quantization_config=SparseConfig(method="magnitude", sparsity=sparsity, attention=SETTINGS),
    )
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config._attn_implementation == "hs_block"
    assert again.hf_quantizer.quantization_config.attention == AttentionSettings(**SETTINGS)
    assert torch.equal(logits(again), expected)
    hf_sparse.use_attention(again, None)
    assert not torch.allclose(logits(again), expected, atol=1e-3)
    again.save_pretrained(tmp_path / "exact")
    config = json.loads((tmp_path / "exact" / "config.json").read_text())
    assert config["quantization_config"]["attention"] is None


@pytest.mark.parametrize("asked", ["sdpa", "eager", "hs_smyrf"])
def test_an_attention_that_is_passed_to_from_pretrained_wins_over_the_saved_one(tmp_path, asked):
    model = make("llama")
    hf_sparse.prune(model, SparseConfig(method="magnitude", sparsity=0.5, attention=SETTINGS))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=asked)
    assert again.config._attn_implementation == asked
    assert states(again) == {}
    assert again.hf_quantizer.quantization_config.attention is None


def test_two_attentions_that_are_asked_for_are_an_error(tmp_path):
    make("llama").save_pretrained(tmp_path)
    config = SparseConfig(method="magnitude", attention=SETTINGS)
    with pytest.raises(ConfigError, match="'sdpa' and attention with method 'hs_block'"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, attn_implementation="sdpa"
        )


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_checkpoint_s_attention_can_be_another_one_when_it_is_loaded(tmp_path):
    model = make("llama")
    hf_sparse.prune(model, SparseConfig(method="magnitude", sparsity=0.5, attention=SETTINGS))
    model.save_pretrained(tmp_path)
    kept = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=SparseConfig(prefer="memory")
    )
    assert kept.hf_quantizer.quantization_config.attention == AttentionSettings(**SETTINGS)
    other = SETTINGS | {"keys": 32}
    changed = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=SparseConfig(attention=other)
    )
    assert changed.model.layers[0].self_attn.sparse_attention.settings.keys == 32


@pytest.mark.slow
def test_without_the_package_a_dense_model_has_exact_attention_and_a_warning(tmp_path):
    dense = make("llama")
    expected = logits(dense)
    hf_sparse.prune(dense, SparseConfig(method="magnitude", sparsity=0, attention=SETTINGS))
    dense.save_pretrained(tmp_path)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()\n"
        "assert 'hf_sparse' not in sys.modules and m.config._attn_implementation == 'sdpa'\n"
        f"torch.save(m(**torch.load({str(tmp_path / 'in.pt')!r})).logits, "
        f"{str(tmp_path / 'out.pt')!r})"
    )
    torch.save(batch("left", "llama")[0], tmp_path / "in.pt")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Unknown quantization type, got hf_sparse" in done.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def test_what_can_not_be_learned_leaves_the_attention_that_was_there():
    model = make("llama")
    hf_sparse.use_attention(model, SETTINGS)
    model.model.layers[0].train()
    unknown = [{"input_ids": torch.tensor([[10**6, 1, 2]])}]
    with pytest.raises(CalibrationError):
        hf_sparse.use_attention(model, "hs_routing", unknown)
    assert model.config._attn_implementation == "hs_block"
    assert {state.settings.method for state in states(model).values()} == {"hs_block"}


def test_the_dry_run_leaves_each_module_s_mode():
    model = make("llama")
    model.model.layers[0].train()
    hf_sparse.use_attention(model, SETTINGS)
    assert model.model.layers[0].training
    assert not model.model.layers[1].training


def test_exact_attention_of_another_kind_stays():
    model = make("llama")
    model.set_attn_implementation("eager")
    hf_sparse.use_attention(model, None)
    assert model.config._attn_implementation == "eager"
