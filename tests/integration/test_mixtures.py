"""Mixtures of experts: each expert pruned by itself, saved, reloaded and put together again."""

import copy
import json
import math

import fresh
import pytest
import torch
from safetensors import safe_open
from tiny_models import MIXTURE, drawn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import hf_sparse
from conftest import FIXTURES, logits
from hf_sparse import SparseConfig, SparseLinear
from hf_sparse.layers import SparseExperts


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**MIXTURE, num_local_experts=4))


def qwen3_moe():
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MIXTURE, moe_intermediate_size=16, num_experts=6))


def gpt_oss():
    """Transposed experts with biases."""
    return GptOssForCausalLM(GptOssConfig(**MIXTURE, num_local_experts=4, sliding_window=16))


FAMILIES = [mixtral, qwen3_moe, gpt_oss]


def build(make):
    return drawn(make(), std=0.2)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def expert_layers(report):
    return [layer for layer in report.layers if "experts" in layer.name]


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("make", FAMILIES)
def test_experts_are_pruned_saved_reloaded_and_fused_again(make, token_ids, tmp_path):
    build(make).save_pretrained(tmp_path / "dense")
    config = SparseConfig(dataset=token_ids, num_samples=12)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    report = model.hf_quantizer.report
    experts = [m for m in model.modules() if isinstance(m, SparseExperts)]
    assert len(experts) == 2
    assert len(expert_layers(report)) == 2 * 2 * experts[0].num_experts
    assert all(layer.zeros == math.prod(layer.shape) // 2 for layer in report.layers)
    assert all(isinstance(layer, SparseLinear) for m in experts for layer in m.layers(0))
    assert not any(p.ndim == 3 for p in model.parameters())
    assert not any("experts" in name for name in report.left_dense)
    expected = logits(model, token_ids)

    model.save_pretrained(tmp_path / "sparse", max_shard_size="16KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(again, token_ids), expected)
    again.save_pretrained(tmp_path / "again", max_shard_size="16KB")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(twice, token_ids), expected)

    original = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for number, source in enumerate((model, again)):
        hf_sparse.export_dense(source, tmp_path / f"export{number}")
        export = AutoModelForCausalLM.from_pretrained(tmp_path / f"export{number}")
        assert list(export.state_dict()) == list(original.state_dict())
        torch.testing.assert_close(logits(export, token_ids), expected)
        zeros = sum(int((p == 0).sum()) for p in export.parameters())
        assert zeros == sum(layer.zeros for layer in report.layers)
    dense = again.dequantize()
    assert_same(state(dense), state(export))
    # The layout that the family's checkpoints have: split or merged as transformers does it.
    for folder in ("dense", "export0", "export1"):
        assert keys(tmp_path / folder) == keys(tmp_path / "dense")


def keys(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("targets", [[r"experts\.1"], [r"experts\.\d+\.down_proj"], ["q_proj"]])
def test_what_is_not_pruned_keeps_its_bits(make, targets, token_ids, tmp_path):
    model = build(make)
    before = state(model)
    report = hf_sparse.prune(model, SparseConfig(method="magnitude", targets=targets))
    assert 0 < len(report.layers) < len(report.left_dense)
    expected = logits(model, token_ids)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, token_ids), expected)
    after = state(again.dequantize())
    assert sorted(after) == sorted(before)
    for name, tensor in after.items():
        kept = tensor != 0
        assert torch.equal(tensor[kept], before[name][kept])
    zeros = sum(int((t == 0).sum()) for t in after.values())
    assert zeros == sum(layer.zeros for layer in report.layers)


def test_experts_of_which_none_is_pruned_stay_fused(token_ids):
    model = build(mixtral)
    before = state(model)
    hf_sparse.prune(model, SparseConfig(method="magnitude", modules_to_not_convert=["experts"]))
    assert not any(isinstance(m, SparseExperts) for m in model.modules())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(model.state_dict()[name], before[name])


def test_tied_experts_stay_dense_and_tied(monkeypatch, token_ids, tmp_path):
    """Those of the last two blocks are one; the first block's are pruned."""
    ties = {"model.layers.2.mlp.experts": "model.layers.1.mlp.experts"}
    monkeypatch.setattr(MixtralForCausalLM, "_tied_weights_keys", ties)
    sizes = MIXTURE | {"num_hidden_layers": 3, "tie_word_embeddings": True}
    dense = build(lambda: MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)))
    dense.save_pretrained(tmp_path / "dense")
    config = SparseConfig(dataset=token_ids, num_samples=12)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    report = model.hf_quantizer.report
    assert len(report.layers) == 3 * 4 + 2 * 4
    first, second = (f"model.layers.{block}.mlp.experts" for block in (1, 2))
    for one, other in ((first, second), (second, first)):
        for local in ("gate_up_proj", "down_proj"):
            reason = report.left_dense[f"{one}.{local}"]
            assert reason == f"its weight is tied to {other}.{local}"
    model.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    for found in (model, again):
        weights = dict(found.named_parameters(remove_duplicate=False))
        for local in ("gate_up_proj", "down_proj"):
            assert weights[f"{first}.{local}"] is weights[f"{second}.{local}"]
            assert torch.equal(weights[f"{first}.{local}"], dense.state_dict()[f"{first}.{local}"])


@pytest.mark.parametrize("bad", ["weights", "data"])
def test_after_an_error_the_model_is_as_it_was(bad, token_ids):
    model = build(gpt_oss)
    if bad == "weights":
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = torch.nan
    before = state(model)
    data = token_ids if bad == "weights" else [{"pixel_values": torch.zeros(1, 3)}]
    match = r"layers\.1\.mlp\.experts\.2\.down_proj" if bad == "weights" else "can't run on"
    with pytest.raises(hf_sparse.HfSparseError, match=match):
        hf_sparse.prune(model, SparseConfig(dataset=data))
    after = state(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[n].nan_to_num(), t.nan_to_num()) for n, t in before.items())


@pytest.mark.parametrize("make", FAMILIES)
def test_reports_tell_tokens_and_experts_that_lack_them(make, token_ids):
    model = build(make)
    config = SparseConfig(dataset=token_ids, num_samples=12, moe_min_tokens=10**6)
    report = hf_sparse.prune(model, config)
    layers = [layer for layer in expert_layers(report) if "down_proj" in layer.name]
    tokens = token_ids.numel()
    for block in range(2):
        own = [layer.tokens for layer in layers if f"layers.{block}." in layer.name]
        assert sum(own) == 2 * tokens
    for layer in report.layers:
        if "experts" in layer.name:
            assert layer.notes[-1].startswith(f"{layer.tokens} calibration tokens were routed")
            assert f"mean of all {tokens} " in layer.notes[-1]
            assert f"note: {layer.notes[-1]}" in str(report)
        else:
            assert (layer.tokens, layer.notes) == (tokens, ())


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "fast", "balanced", "best"])
def test_all_methods_prune_experts_that_no_token_reaches(method, token_ids):
    model = build(mixtral)
    for layer in model.model.layers:  # all tokens go to the first two
        layer.mlp.gate.weight.data.zero_()
    config = SparseConfig(method=method, dataset=token_ids, num_samples=12)
    report = hf_sparse.prune(model, config)
    reached: dict[int, list] = {}
    for layer in expert_layers(report):
        reached.setdefault(layer.tokens, []).append(layer)
    assert set(reached) == {0, token_ids.numel()}
    assert all("0 calibration tokens" in str(layer.notes) for layer in reached[0])
    assert len(expert_layers(report)) == 16


def test_calibrate_all_experts_takes_all_tokens_for_each(token_ids):
    config = SparseConfig(dataset=token_ids, num_samples=12, calibrate_all_experts=True)
    report = hf_sparse.prune(build(gpt_oss), config)
    assert {layer.tokens for layer in report.layers} == {token_ids.numel()}
    assert not any(layer.notes for layer in report.layers)


def test_routers_stay_dense(token_ids):
    model = build(mixtral)
    gate = model.model.layers[0].mlp.gate.weight.detach().clone()
    hf_sparse.prune(model, SparseConfig(method="magnitude"))
    assert torch.equal(model.model.layers[0].mlp.gate.weight, gate)


def test_experts_that_are_modules_are_pruned_as_linear_layers(token_ids):
    config = SwitchTransformersConfig(
        vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_sparse_encoder_layers=1,
        num_decoder_layers=2, num_sparse_decoder_layers=1, num_heads=2, num_experts=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(config).eval()
    data = [{"input_ids": ids[None], "decoder_input_ids": ids[None, :6]} for ids in token_ids]
    report = hf_sparse.prune(model, SparseConfig(dataset=data, num_samples=12))
    experts = {layer.name: layer for layer in expert_layers(report)}
    assert experts
    assert all(layer.zeros == math.prod(layer.shape) // 2 for layer in experts.values())
    assert any(layer.tokens < token_ids.numel() for layer in experts.values())
    left = [name for name in report.left_dense if "experts" in name]
    assert all("no calibration token" in report.left_dense[name] for name in left)


def test_a_base_model_reads_a_head_models_experts(token_ids, tmp_path):
    model = build(mixtral)
    hf_sparse.prune(model, SparseConfig(method="magnitude"))
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.model(token_ids).last_hidden_state
        assert torch.equal(base(token_ids).last_hidden_state, expected)


def test_copies_of_sparse_experts_are_models_of_their_own(token_ids):
    model = build(gpt_oss)
    hf_sparse.prune(model, SparseConfig(method="magnitude"))
    expected = logits(model, token_ids)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, token_ids), expected)
    other.dequantize()
    assert torch.equal(logits(model, token_ids), expected)


PLAIN = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


@pytest.mark.parametrize("make", FAMILIES)
def test_plain_transformers_makes_up_no_experts(make, tmp_path):
    model = build(make)
    hf_sparse.prune(model, SparseConfig(method="magnitude", targets=["experts"]))
    model.save_pretrained(tmp_path)
    for strip in (False, True):
        if strip:
            config = json.loads((tmp_path / "config.json").read_text())
            del config["quantization_config"]
            (tmp_path / "config.json").write_text(json.dumps(config))
        result = fresh.run(PLAIN, tmp_path)
        assert result.returncode != 0
        assert "import-hf_sparse-first" in result.stderr
        assert strip or "hf_sparse" in result.stderr


# --- a trained mixture ----------------------------------------------------------------------


needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="needs the fixtures folder")


def sequences(name, count):
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tiny-mixtral-docs")
    ids = []
    for page in (FIXTURES / name).read_text().split("\n\n\x00\n"):
        ids += [0, *tokenizer(page, add_special_tokens=False)["input_ids"]]
    return torch.tensor(ids[: count * 256]).view(count, 256)


@needs_fixtures
def test_experts_take_little_more_than_half_the_memory():
    model = AutoModelForCausalLM.from_pretrained(
        FIXTURES / "tiny-mixtral-docs", quantization_config=SparseConfig(method="magnitude")
    )
    assert model.dtype == torch.bfloat16
    experts = [layer for layer in hf_sparse.explain(model).layers if "experts" in layer.name]
    assert len(experts) == 5 * 8 * 2
    dense = sum(layer.bytes_dense for layer in experts)
    assert sum(layer.bytes_resident for layer in experts) <= 0.57 * dense
    held = sum(
        tensor.nbytes
        for m in model.modules()
        if isinstance(m, SparseExperts)
        for tensor in (*m.parameters(), *m.buffers())
    )
    assert held <= 0.57 * dense


def perplexity(model, ids):
    scores = logits(model, ids)[:, :-1].float().log_softmax(dim=-1)
    return math.exp(-scores.gather(2, ids[:, 1:, None]).mean())


def output_error(model, seen):
    """Of the experts of all blocks, relative, on what the dense model's experts were handed."""
    blocks = [m for m in model.modules() if isinstance(m, SparseExperts)]
    with torch.no_grad():
        pairs = [(m(*args), expected) for m, (args, expected) in zip(blocks, seen, strict=True)]
    return sum(float((a - b).norm() / b.norm()) for a, b in pairs) / len(pairs)


@pytest.mark.slow
@needs_fixtures
def test_sparsegpt_beats_wanda_beats_magnitude_in_a_trained_mixture():
    """Its experts change the perplexity by a hair, so theirs are compared by their outputs."""
    load = AutoModelForCausalLM.from_pretrained
    path, settings = FIXTURES / "tiny-mixtral-docs", {"dtype": torch.float32}
    evaluation, dense, seen = sequences("evaluation.txt", 32), load(path, **settings), []
    for layer in dense.model.layers:
        layer.mlp.experts.register_forward_hook(
            lambda module, args, output: seen.append((args, output))
        )
    logits(dense, evaluation)
    errors, perplexities = {}, {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        config = SparseConfig(
            method=method, dataset=sequences("calibration.txt", 32), num_samples=32
        )
        model = load(path, quantization_config=config, **settings)
        errors[method] = output_error(model, seen)
        perplexities[method] = perplexity(model, evaluation)
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]
    assert perplexities["sparsegpt"] < min(perplexities["wanda"], perplexities["magnitude"])
