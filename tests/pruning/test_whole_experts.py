"""Whole experts that go: which, what goes with them, and what is refused."""

import copy
import json
import logging

import pytest
import torch
from tiny_models import DECODER, MIXTURE, drawn, tiny_llama, tiny_mixtral
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import hf_sparse
from conftest import logits
from hf_sparse import CalibrationError, ConfigError, PruningReport, SolveError, SparseConfig


def olmoe():
    """Doesn't; its config has another name for the number, and as many heads as experts."""
    return drawn(OlmoeForCausalLM(OlmoeConfig(**MIXTURE, num_experts=4)))


def deepseek_v3(**changes):
    """Its router chooses among groups, by scores with a correction."""
    sizes = dict(
        DECODER, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, n_shared_experts=1, moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=6, first_k_dense_replace=1,
    )  # fmt: skip
    return drawn(DeepseekV3ForCausalLM(DeepseekV3Config(**sizes | changes)))


def config(token_ids, **arguments):
    return SparseConfig(**{"experts": 0.25, "dataset": token_ids} | arguments)


class Masked(nn.Module):
    """A router in which no token goes to some experts."""

    def __init__(self, gate, removed, renormalises):
        super().__init__()
        self.weight, self.removed, self.renormalises = gate.weight, removed, renormalises

    def forward(self, x):
        scores = x.reshape(-1, x.shape[-1]) @ self.weight.T
        scores[:, list(self.removed)] = -torch.inf
        gates, chosen = scores.softmax(dim=-1).topk(2)
        if self.renormalises:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return scores, gates, chosen


@pytest.mark.parametrize("score", ["reap", "contribution", "frequency", "norm"])
@pytest.mark.parametrize(("make", "renormalises"), [(tiny_mixtral, True), (olmoe, False)])
def test_what_is_left_computes_as_if_no_token_went_to_the_others(
    make, renormalises, score, token_ids
):
    model, dense = make(), make()
    report = hf_sparse.prune(model, config(token_ids, expert_score=score))
    assert (report.layers, len(report.experts)) == ((), 2)
    for mixture in report.experts:
        assert mixture.removed == (min(range(4), key=mixture.scores.__getitem__),)
        assert sum(mixture.shares) == pytest.approx(2)
        assert mixture.tokens == token_ids.numel()
        block = dense.get_submodule(mixture.name.removesuffix(".experts"))
        block.gate = Masked(block.gate, mixture.removed, renormalises)
    torch.testing.assert_close(logits(model, token_ids), logits(dense, token_ids))
    tokens = [share * token_ids.numel() for share in mixture.shares]
    if score == "frequency":
        assert list(mixture.scores) == tokens
    if score == "contribution":
        reap = hf_sparse.prune(make(), config(token_ids)).experts[-1].scores
        sums = [mean * number for mean, number in zip(reap, tokens, strict=True)]
        assert mixture.scores == pytest.approx(sums)


def test_each_group_of_a_router_loses_as_many_and_corrections_go_with_the_rows(token_ids):
    model = deepseek_v3()
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.copy_(torch.randn(8))
    weight, correction = gate.weight.detach().clone(), gate.e_score_correction_bias.clone()
    shared = copy.deepcopy(model.model.layers[1].mlp.shared_experts.state_dict())
    (mixture,) = hf_sparse.prune(model, config(token_ids)).experts
    assert [expert // 4 for expert in mixture.removed] == [0, 1]
    kept = [expert for expert in range(8) if expert not in mixture.removed]
    gate = model.model.layers[1].mlp.gate
    assert torch.equal(gate.weight, weight[kept])
    assert torch.equal(gate.e_score_correction_bias, correction[kept])
    after = model.model.layers[1].mlp.shared_experts.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in shared.items())


def test_it_is_saved_as_an_ordinary_checkpoint_with_its_report_and_card(token_ids, tmp_path):
    tiny_mixtral().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config(token_ids)
    )
    report = model.hf_quantizer.report
    model.save_pretrained(tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["num_local_experts"] == 3
    assert "quantization_config" not in described
    assert PruningReport.from_folder(tmp_path / "out") == report
    assert report.summary() == "removed 2 of 8 experts"
    assert str(report).startswith("model.layers.0.mlp.experts: 1 of 4 experts went (")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from which 2 of 8 experts have been removed" in card
    assert "import hf_sparse" not in card
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(again, "hf_quantizer")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


def test_sparsity_and_bits_hold_inside_what_is_left(token_ids, tmp_path):
    model = tiny_mixtral()
    report = hf_sparse.prune(model, config(token_ids, sparsity=0.5, bits=4, group_size=8))
    names = [layer.name for layer in report.layers if "experts" in layer.name]
    assert names == [
        f"model.layers.{block}.mlp.experts.{expert}.{part}_proj"
        for block in range(2)
        for expert in range(3)
        for part in ("gate_up", "down")
    ]
    assert all(layer.sparsity >= 0.5 for layer in report.layers)
    assert report.summary().startswith("removed 2 of 8 experts; pruned 20 layers")
    expected = logits(model, token_ids)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, token_ids), expected)
    hf_sparse.export_dense(again, tmp_path / "export")
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert export.config.num_local_experts == 3
    torch.testing.assert_close(logits(export, token_ids), expected)


def test_what_is_left_is_pruned_on_what_the_others_tokens_now_do(token_ids):
    """As a model that never had the experts."""
    model = tiny_mixtral()
    report = hf_sparse.prune(model, config(token_ids, sparsity=0.5, method="wanda"))
    smaller = tiny_mixtral()
    hf_sparse.prune(smaller, config(token_ids))
    dense = tiny_mixtral(num_local_experts=3)
    dense.load_state_dict(smaller.state_dict())
    alone = hf_sparse.prune(dense, SparseConfig(method="wanda", dataset=token_ids))
    assert torch.equal(logits(model, token_ids), logits(dense, token_ids))
    assert [layer.tokens for layer in report.layers] == [layer.tokens for layer in alone.layers]


def test_targets_are_named_as_in_the_model_as_it_was(token_ids):
    model = tiny_mixtral()
    (first, _) = hf_sparse.prune(copy.deepcopy(model), config(token_ids)).experts
    last = max(set(range(4)) - set(first.removed))
    target = rf"layers\.0\.mlp\.experts\.{last}"
    report = hf_sparse.prune(model, config(token_ids, sparsity=0.5, targets=[target]))
    assert [layer.name for layer in report.layers] == [
        f"model.layers.0.mlp.experts.2.{part}_proj" for part in ("gate_up", "down")
    ]


class LayeredMixtral(MixtralForCausalLM):
    """Each layer has as many experts as its own config says."""

    def __init__(self, config):
        config.allow_global_per_layer_attribute_access = True
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.mlp = MixtralSparseMoeBlock(config.per_layer_config[index])


def test_a_global_budget_takes_the_lowest_scores_of_all_layers(token_ids, tmp_path):
    model = drawn(LayeredMixtral(MixtralConfig(**MIXTURE, num_local_experts=4)))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[1:3] *= 1e-3
    report = hf_sparse.prune(model, config(token_ids, expert_budget="global"))
    assert {m.name[:14]: m.removed for m in report.experts} == {
        "model.layers.0": (),
        "model.layers.1": (1, 2),
    }
    model.save_pretrained(tmp_path)
    again = LayeredMixtral.from_pretrained(tmp_path)
    assert [layer.mlp.experts.num_experts for layer in again.model.layers] == [4, 2]
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


def test_a_family_with_one_number_for_all_layers_refuses_a_global_budget(token_ids):
    with pytest.raises(ConfigError, match=r"one number, num_local_experts.*expert_budget='layer'"):
        hf_sparse.prune(tiny_mixtral(), config(token_ids, expert_budget="global"))


@pytest.mark.parametrize(
    ("make", "arguments", "match"),
    [
        (
            tiny_mixtral,
            {"experts": 0.75},
            "sends each token to 2 experts, and 1 of 4 would be left",
        ),
        (tiny_mixtral, {"experts": 0.2}, r"removes none of the 4 experts .* at least 0\.25"),
        (deepseek_v3, {"experts": 0.375}, r"removes 3 of the 8 .* 2 groups .* pass 0\.25 or 0\.5"),
        (deepseek_v3, {"experts": 0.75}, "1 of 8 would be left in the 1 groups"),
        (tiny_llama, {}, "LlamaForCausalLM has no experts that can be taken apart"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), {}, "Sequential is none: leave experts out"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_stays_as_it_was(make, arguments, match, token_ids):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=match):
        hf_sparse.prune(model, config(token_ids, **arguments))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"experts": 1}, "0 < s < 1"),
        ({"experts": 25}, "for 25 % pass 0.25"),
        ({"experts": 0}, "0 < s < 1"),
        ({"expert_score": "random"}, "'reap' or 'contribution' or 'frequency' or 'norm'"),
        ({"expert_budget": "model"}, "'layer' or 'global'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, match, token_ids):
    with pytest.raises(ConfigError, match=match):
        config(token_ids, **arguments)


def test_experts_need_data_whatever_the_method():
    with pytest.raises(ConfigError, match=r"experts=0\.25 needs calibration data"):
        hf_sparse.prune(tiny_mixtral(), SparseConfig(experts=0.25, method="magnitude"))


def test_sparsity_is_none_beside_experts_unless_asked_for():
    assert SparseConfig(experts=0.25).sparsity == 0
    assert SparseConfig(experts=0.25, pattern="2:4").sparsity == 0.5


def test_a_router_that_looks_experts_up_is_refused(token_ids):
    model = tiny_mixtral()
    model.model.layers[0].mlp.gate.register_buffer("table", torch.zeros(61, 2, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"gate\.table holds whole numbers"):
        hf_sparse.prune(model, config(token_ids))


def test_what_the_config_does_not_describe_is_refused(token_ids):
    model = tiny_mixtral()
    model.model.layers[0].extra = nn.Linear(3, 3)
    with pytest.raises(ConfigError, match=r"isn't the model that its config.*layers\.0\.extra"):
        hf_sparse.prune(model, config(token_ids))
    assert model.config.num_local_experts == 4


def test_few_tokens_are_warned_of(token_ids, caplog):
    model = tiny_mixtral()
    for layer in model.model.layers:  # all tokens go to the same two
        layer.mlp.gate.weight.data.zero_()
    with caplog.at_level(logging.WARNING):
        report = hf_sparse.prune(model, config(token_ids, experts=0.5))
    assert [mixture.lost_share for mixture in report.experts] == [0, 0]
    few = [record.message for record in caplog.records if "fewer than 100" in record.message]
    assert len(few) == 1
    assert few[0].startswith("4 of 8 experts were reached")


def test_after_an_error_behind_the_removal_the_model_refuses_to_be_used(token_ids):
    model = tiny_mixtral()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(1e30)
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e-30)
    with pytest.raises((SolveError, CalibrationError), match="broke off when 0 of 2 blocks"):
        hf_sparse.prune(model, config(token_ids, sparsity=0.5))
    with pytest.raises(SolveError, match="half pruned"):
        model(token_ids)
