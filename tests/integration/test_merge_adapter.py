"""merge_adapter: an adapter merged into a sparse model that stays sparse."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import DECODER, build, tiny_bert, tiny_gpt2
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
)

import hf_sparse
from conftest import logits
from hf_sparse import AdapterError, CalibrationError, ConfigError, SparseConfig, SparseLinear
from hf_sparse.layers import sparse_layers
from hf_sparse.training.merging import run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

Q = "model.layers.0.self_attn.q_proj"


def prune(model, **settings):
    settings = {"method": "magnitude", "sparsity": 0.5, **settings}
    hf_sparse.prune(model, SparseConfig(**settings))
    return model


def adapt(model, seed=0, scale=0.1, **settings):
    """A LoRA model whose adapter is random and does something."""
    torch.manual_seed(seed)
    settings = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **settings}
    adapted = get_peft_model(model, LoraConfig(r=4, **settings)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(scale)
    return adapted


def patterns(model):
    found = sparse_layers(model)
    return {n.replace(".base_layer", ""): m.sparse_weight != 0 for n, m in found.items()}


def same_pattern(before, model):
    after = patterns(model)
    assert before.keys() == after.keys()
    return all(torch.equal(after[name], mask) for name, mask in before.items())


@pytest.fixture
def base(tiny):
    return prune(tiny)


@pytest.fixture
def ids(token_ids):
    return list(token_ids)


# --- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["masked", "resolve"])
def test_the_model_stays_sparse_and_its_error_is_the_reported_one(base, token_ids, ids, policy):
    base.lm_head.weight.data *= 20  # peaked: a divergence far above what rounding makes of none
    before = patterns(base)
    model = adapt(base, scale=1)
    expected = logits(model, token_ids)
    merged = hf_sparse.merge_adapter(model, policy, dataset=ids, num_samples=12)
    assert merged is base
    assert same_pattern(before, merged)
    assert not [m for m in merged.modules() if isinstance(m, LoraLayer)]
    assert all(isinstance(merged.get_submodule(name), SparseLinear) for name in before)
    report = merged.merge_report
    found = logits(merged, token_ids)
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.5
    assert report.fidelity.output_error == pytest.approx(error, rel=1e-3)
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    assert divergence > 1e-2
    assert report.fidelity.kl_divergence == pytest.approx(divergence, rel=1e-3)
    assert report.fidelity.tokens == token_ids.numel()
    assert report.policy == policy
    assert report.adapters == ("default",)
    assert {layer.name for layer in report.layers} == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    for layer in report.layers:
        mask = before[layer.name]
        assert layer.zeros == int((~mask).sum())
        assert layer.sparsity == layer.zeros / mask.numel() == 0.5
        assert layer.tokens == token_ids.numel()
    assert json.loads(report.to_json())["fidelity"]["tokens"] == token_ids.numel()
    assert report.layers[0].name in str(report)


def test_the_weight_error_is_the_distance_to_the_whole_weight(base):
    model = adapt(base)
    layer = model.get_base_model().get_submodule(Q)
    whole = layer.base_layer.weight + layer.get_delta_weight("default").detach()
    merged = hf_sparse.merge_adapter(model)
    found = merged.get_submodule(Q).weight
    expected = float((found - whole).norm() / whole.norm())
    report = {entry.name: entry for entry in merged.merge_report.layers}
    assert report[Q].weight_error == pytest.approx(expected, rel=1e-4)
    assert report[Q].output_error is None
    assert merged.merge_report.fidelity is None


def test_resolve_solves_the_layers_least_squares_on_its_pattern(base, token_ids, ids):
    model = adapt(base, target_modules=[Q])
    wrapped = model.get_base_model().get_submodule(Q)
    mask = wrapped.base_layer.sparse_weight != 0
    target = (wrapped.base_layer.weight + wrapped.get_delta_weight("default").detach()).double()
    inputs = []
    hook = wrapped.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    logits(model, token_ids)
    hook.remove()
    x = torch.cat(inputs).double()
    hessian = x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    merged = hf_sparse.merge_adapter(model, "resolve", dataset=ids, num_samples=12, refit=100)
    found = merged.get_submodule(Q).weight
    for row in range(len(mask)):
        kept = mask[row].nonzero().flatten()
        values = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ target[row])
        torch.testing.assert_close(found[row, kept].double(), values, rtol=1e-3, atol=1e-4)
    output_error = (x @ (found - target).T).norm() / (x @ target.T).norm()
    (entry,) = merged.merge_report.layers
    assert entry.output_error == pytest.approx(float(output_error), rel=0.05)  # on a sample


def test_resolve_is_closer_to_the_unmerged_model_than_masked(base, ids):
    model = adapt(base)
    masked = hf_sparse.merge_adapter(copy.deepcopy(model), dataset=ids)
    resolved = hf_sparse.merge_adapter(model, "resolve", dataset=ids)
    assert (
        resolved.merge_report.fidelity.output_error
        < 0.9 * masked.merge_report.fidelity.output_error
    )


def test_the_merged_model_is_saved_and_reloaded(base, token_ids, ids, tmp_path):
    merged = hf_sparse.merge_adapter(adapt(base), "resolve", dataset=ids)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, token_ids), logits(merged, token_ids))
    assert same_pattern(patterns(merged), again)


def test_an_adapter_from_disk_on_a_reloaded_base_merges_alike(base, token_ids, tmp_path):
    base.save_pretrained(tmp_path / "base")
    model = adapt(base)
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    first, second = hf_sparse.merge_adapter(model), hf_sparse.merge_adapter(loaded)
    assert torch.equal(logits(first, token_ids), logits(second, token_ids))


@pytest.mark.parametrize("bits", [None, 4])
def test_it_merges_in_half_precision_into_the_layers_own_form(tiny, token_ids, ids, bits):
    model = adapt(prune(tiny.bfloat16(), bits=bits, group_size=8))
    before = patterns(model.get_base_model())
    labels = {layer.format.label for layer in sparse_layers(model).values()}
    merged = hf_sparse.merge_adapter(model, "resolve", dataset=ids)
    assert same_pattern(before, merged)
    assert {layer.format.label for layer in sparse_layers(merged).values()} == labels
    assert merged.get_submodule(Q).weight.dtype == torch.bfloat16
    assert merged.merge_report.fidelity.output_error < 0.5


# --- adapters -----------------------------------------------------------------------------------


def test_a_merged_layer_rounds_its_inputs_and_is_held_as_before(tiny):
    base = prune(tiny, bits=8, group_size=16, activations="int8", prefer="memory")
    before = {n: (m.activations, m.form) for n, m in sparse_layers(base).items()}
    assert set(before.values()) == {("int8", "packed")}
    merged = hf_sparse.merge_adapter(adapt(base))
    assert {n: (m.activations, m.form) for n, m in sparse_layers(merged).items()} == before


def test_the_active_adapters_are_merged_with_their_scaling_and_no_other(base, token_ids):
    model = adapt(base, lora_alpha=8)
    torch.manual_seed(5)
    other = LoraConfig(
        r=2, lora_alpha=6, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False
    )
    model.add_adapter("other", other)
    model.add_adapter("third", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    layer = model.get_base_model().get_submodule(Q)
    whole = layer.base_layer.matrix
    for name, scale in (("default", 8 / 4), ("other", 6 / 2**0.5)):
        product = layer.lora_B[name].weight @ layer.lora_A[name].weight
        whole = whole + scale * product.detach()
    mask = layer.base_layer.sparse_weight != 0
    merged = hf_sparse.merge_adapter(model)
    torch.testing.assert_close(merged.get_submodule(Q).weight, whole * mask)
    assert merged.merge_report.adapters == ("default", "other")


def test_layers_that_the_active_adapter_leaves_alone_are_as_they_were(base, token_ids, ids):
    model = adapt(base)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")
    name = "model.layers.0.mlp.down_proj"
    before = model.get_base_model().get_submodule(name).base_layer
    merged = hf_sparse.merge_adapter(model, "resolve", dataset=ids)
    assert merged.get_submodule(name) is before
    assert name not in {layer.name for layer in merged.merge_report.layers}


def test_dense_layers_and_modules_to_save_are_merged_by_peft(base, token_ids, ids):
    model = adapt(base, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    saved = model.get_base_model().model.embed_tokens.modules_to_save["default"]
    saved.weight.data += 0.1
    head = model.get_base_model().lm_head
    whole = head.base_layer.weight + head.get_delta_weight("default")
    merged = hf_sparse.merge_adapter(model, dataset=ids)
    assert type(merged.lm_head) is nn.Linear
    torch.testing.assert_close(merged.lm_head.weight, whole)
    assert merged.model.embed_tokens is saved


@pytest.mark.parametrize("policy", ["masked", "resolve"])
def test_conv1d_and_biases_of_adapters(token_ids, ids, policy, tmp_path):
    model = adapt(prune(tiny_gpt2()), target_modules=["c_attn", "c_proj"], lora_bias=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            parameter.data.add_(0.3)
    name = "transformer.h.0.attn.c_attn"
    wrapped = model.get_base_model().get_submodule(name)
    bias = wrapped.base_layer.bias + wrapped.lora_B["default"].bias * wrapped.scaling["default"]
    before = patterns(model)
    merged = hf_sparse.merge_adapter(model, policy, dataset=ids, refit=50)
    assert same_pattern({n.removeprefix("base_model.model."): m for n, m in before.items()}, merged)
    torch.testing.assert_close(merged.get_submodule(name).bias, bias)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, token_ids), logits(merged, token_ids))


@pytest.mark.filterwarnings("ignore:A weight that does not fit")
def test_what_peft_merges_into_conv1d_layers_is_right_after_a_reload(token_ids, tmp_path):
    model = adapt(prune(tiny_gpt2()), target_modules=["c_attn", "c_proj"])  # attn.c_proj is square
    expected = logits(model, token_ids)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, token_ids), expected)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, token_ids), expected)
    torch.testing.assert_close(logits(again.dequantize(), token_ids), expected)


@pytest.mark.parametrize("policy", ["masked", "resolve"])
def test_a_low_rank_part_stays_beside_the_merged_weight(tiny, token_ids, ids, policy):
    model = adapt(prune(tiny, low_rank=2, dataset=ids))
    before, own = patterns(model.get_base_model()), model.get_base_model().get_submodule(Q)
    low_rank = own.base_layer.low_rank
    merged = hf_sparse.merge_adapter(model, policy, dataset=ids)
    assert same_pattern(before, merged)
    assert torch.equal(merged.get_submodule(Q).low_rank.b, low_rank.b)
    assert merged.merge_report.fidelity.output_error < 0.5


# --- mixtures of experts ------------------------------------------------------------------------


def mixture():
    config = MixtralConfig(**DECODER, num_local_experts=4, head_dim=6)
    return prune(build(MixtralForCausalLM, config))


@pytest.mark.parametrize("policy", ["masked", "resolve"])
def test_experts_are_adapted_layer_by_layer_and_merged(token_ids, ids, policy):
    model = adapt(mixture(), target_modules=["gate_up_proj", "down_proj"])
    before = patterns(model.get_base_model())
    expected = logits(model, token_ids)
    merged = hf_sparse.merge_adapter(model, policy, dataset=ids, num_samples=12)
    assert same_pattern(before, merged)
    assert len(merged.merge_report.layers) == 16
    found = logits(merged, token_ids)
    error = float((found - expected).norm() / expected.norm())
    assert merged.merge_report.fidelity.output_error == pytest.approx(error, rel=1e-3)


def test_the_fused_weights_of_sparse_experts_are_no_target():
    config = LoraConfig(target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
    with pytest.raises(ValueError, match="no `target_parameters` found"):
        get_peft_model(mixture(), config)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"policy": "dense"}, ConfigError, r"policy='dense' is not known: pass 'masked' or 'res"),
        ({"policy": "resolve"}, ConfigError, "policy='resolve' needs calibration data"),
        ({"policy": "resolve", "refit": 0, "dataset": [[1]]}, ConfigError, "refit=0 must be"),
        ({"dataset": [[1, 2]], "num_samples": 0}, ConfigError, "num_samples"),
        ({"dataset": []}, CalibrationError, "dataset"),
    ],
)
def test_wrong_arguments_are_refused(base, arguments, error, message):
    with pytest.raises(error, match=message):
        hf_sparse.merge_adapter(adapt(base), **arguments)


def test_a_model_without_an_adapter_is_refused(base):
    with pytest.raises(AdapterError, match=r"takes a peft.PeftModel, found LlamaForCausalLM"):
        hf_sparse.merge_adapter(base)


def test_a_dense_model_is_refused(tiny):
    with pytest.raises(AdapterError, match=r"has no sparse layer: call merge_and_unload\(\)"):
        hf_sparse.merge_adapter(adapt(tiny))


@pytest.mark.filterwarnings("ignore:A weight that does not fit")
def test_merged_and_disabled_adapters_are_refused(base):
    model = adapt(base)
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"merged already \(default\): call unmerge_adapter\(\)"):
        hf_sparse.merge_adapter(model)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(AdapterError, match=r"disabled .*call enable_adapter_layers\(\)"):
        hf_sparse.merge_adapter(model)


def test_offloaded_layers_are_refused(base, monkeypatch):
    monkeypatch.setattr(SparseLinear, "is_offloaded", lambda self: True)
    with pytest.raises(AdapterError, match=r"layers.0.self_attn.q_proj is offloaded"):
        hf_sparse.merge_adapter(adapt(base))


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
def test_an_adapter_that_peft_can_not_merge_is_refused_with_its_reason(base):
    model = adapt(base, lora_bias=True)  # Llama's layers have no biases to take it
    with pytest.raises(
        AdapterError, match=r"q_proj: PEFT can't merge .*the base layer has no bias"
    ):
        hf_sparse.merge_adapter(model)


def broken(*args, **kwargs):
    raise RuntimeError("the disk is full")


@pytest.mark.parametrize("place", ["solve", "compare", "finish", "nan"])
@pytest.mark.parametrize("policy", ["masked", "resolve"])
def test_a_failure_leaves_the_model_as_it_was(base, token_ids, ids, monkeypatch, policy, place):
    model = adapt(base, target_modules=["q_proj", "lm_head"]).train()
    expected = logits(model.eval(), token_ids)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    model.train()
    if place == "nan":
        last = model.get_base_model().model.layers[1].self_attn.q_proj
        good = last.lora_B["default"].weight.data.clone()
        last.lora_B["default"].weight.data[0, 0] = float("nan")
    elif place == "solve":  # the last layer's
        count = iter(range(10))
        solve = run.merged_layer
        monkeypatch.setattr(
            run, "merged_layer", lambda *args: solve(*args) if next(count) < 1 else broken()
        )
    elif place == "compare":
        monkeypatch.setattr(run, "compare", broken)
    else:
        monkeypatch.setattr(type(model.base_model), "merge_and_unload", broken)
    with pytest.raises((RuntimeError, AdapterError)):
        hf_sparse.merge_adapter(model, policy, dataset=ids)
    monkeypatch.undo()
    if place == "nan":
        last.lora_B["default"].weight.data.copy_(good)
    assert model.training
    assert all(found is modules[name] for name, found in model.named_modules())
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert torch.equal(logits(model.eval(), token_ids), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_without_logits_reports_the_error_of_its_hidden_states(token_ids, ids):
    model = adapt(prune(tiny_bert(BertModel)), target_modules=["query", "value"])
    with torch.no_grad():
        expected = model(input_ids=token_ids).last_hidden_state
        merged = hf_sparse.merge_adapter(model, dataset=ids, num_samples=12)
        found = merged(input_ids=token_ids).last_hidden_state
    error = float((found - expected).norm() / expected.norm())
    assert merged.merge_report.fidelity.output_error == pytest.approx(error, rel=1e-3)
    assert merged.merge_report.fidelity.kl_divergence is None
