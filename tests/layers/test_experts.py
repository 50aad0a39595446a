"""`SparseExperts`: what it computes, and taking fused experts apart and putting them together."""

import copy

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from hf_sparse.formats import Bitmask
from hf_sparse.layers import SparseExperts
from hf_sparse.layers.experts import fuse, is_fused, tied_experts, unfuse, unfused_experts
from hf_sparse.layers.replace import pack_linear, replace_module

TOKENS, HIDDEN, INNER, EXPERTS, K = 11, 6, 5, 4, 2
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER}


def mixtral() -> nn.Module:
    return MixtralExperts(MixtralConfig(**SIZES, num_local_experts=EXPERTS))


def gpt_oss() -> nn.Module:
    """Transposed weights, biases and a gate of its own."""
    return GptOssExperts(GptOssConfig(**SIZES, num_local_experts=EXPERTS))


def nemotron() -> nn.Module:
    """No gate."""
    config = NemotronHConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS
    )
    return NemotronHExperts(config)


MAKE = [mixtral, gpt_oss, nemotron]


def block(make) -> nn.Module:
    """A model with experts of random weights."""
    torch.manual_seed(0)
    model = nn.Module()
    model.experts = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, choices and weights; no token goes to the last expert."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(TOKENS, EXPERTS - 1, generator=generator).topk(K).indices
    inputs = torch.randn(TOKENS, HIDDEN, generator=generator)
    return inputs, chosen, torch.rand(TOKENS, K, generator=generator)


def gated(make, x: torch.Tensor) -> torch.Tensor:
    if make is gpt_oss:
        gate, up = x[::2].clamp(max=7.0), x[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    if make is nemotron:
        return x.clamp(min=0) ** 2
    gate, up = x[:INNER], x[INNER:]
    return gate * torch.sigmoid(gate) * up


def by_hand(make, weights, inputs, chosen, shares) -> torch.Tensor:
    """One token and expert after the other, in float64."""
    up_name = "up_proj" if make is nemotron else "gate_up_proj"
    w = {name: tensor.double() for name, tensor in weights.items()}
    if make is gpt_oss:
        w = {k: v.transpose(1, 2) if v.ndim == 3 else v for k, v in w.items()}
    total = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token, row in enumerate(inputs.double()):
        for slot, expert in enumerate(chosen[token].tolist()):
            if expert == EXPERTS:
                continue
            x = w[up_name][expert] @ row
            x = gated(make, x + w[f"{up_name}_bias"][expert] if make is gpt_oss else x)
            y = w["down_proj"][expert] @ x
            y = y + w["down_proj_bias"][expert] if make is gpt_oss else y
            total[token] += shares[token, slot].double() * y
    return total


@pytest.mark.parametrize("make", MAKE)
def test_experts_as_layers_compute_what_the_routing_says(make):
    model = block(make)
    weights = copy.deepcopy(model.experts.state_dict())
    inputs, chosen, shares = routing()
    unfuse(model, model.experts)
    assert isinstance(model.experts, SparseExperts)
    found = model.experts(inputs, chosen, shares)
    expected = by_hand(make, weights, inputs, chosen, shares)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_number_beyond_the_last_expert_stands_for_none():
    model = block(mixtral)
    weights = copy.deepcopy(model.experts.state_dict())
    inputs, chosen, shares = routing()
    chosen[3:7, 1] = EXPERTS
    unfuse(model, model.experts)
    found = model.experts(inputs, chosen, shares)
    expected = by_hand(mixtral, weights, inputs, chosen, shares)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_no_tokens_give_no_outputs():
    model = block(mixtral)
    unfuse(model, model.experts)
    inputs, chosen, shares = (x[:0] for x in routing())
    assert model.experts(inputs, chosen, shares).shape == (0, HIDDEN)


@pytest.mark.parametrize("make", MAKE)
def test_only_experts_that_are_hit_compute(make):
    model = block(make)
    unfuse(model, model.experts)
    called = []
    for expert in range(EXPERTS):
        model.experts.layers(expert)[1].register_forward_hook(
            lambda module, args, output, expert=expert: called.append((expert, len(output)))
        )
    inputs, chosen, shares = routing()
    model.experts(inputs, chosen, shares)
    counts = chosen.flatten().bincount().tolist()
    assert called == list(enumerate(counts))
    assert len(counts) < EXPERTS


@pytest.mark.parametrize("make", MAKE)
def test_layers_share_the_fused_memory_until_they_settle(make):
    model = block(make)
    storage = model.experts.down_proj.untyped_storage().data_ptr()
    unfuse(model, model.experts)
    weights = [model.experts.layers(i)[1].weight for i in range(EXPERTS)]
    assert {w.untyped_storage().data_ptr() for w in weights} == {storage}
    assert all(w.shape == (HIDDEN, INNER) for w in weights)
    before = [w.detach().clone() for w in weights]
    model.experts.settle()
    assert storage not in {w.untyped_storage().data_ptr() for w in weights}
    assert all(
        w.is_contiguous() and torch.equal(w, b) for w, b in zip(weights, before, strict=True)
    )


@pytest.mark.parametrize("make", MAKE)
def test_fusing_gives_back_the_same_parameters(make):
    model = block(make)
    original = model.experts
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    unfuse(model, original)
    assert not set(before) & set(dict(model.named_parameters()))
    fuse(model, model.experts)
    assert model.experts is original
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_experts_survive_a_copy():
    model = block(gpt_oss)
    unfuse(model, model.experts)
    inputs = routing()
    expected = model.experts(*inputs)
    assert torch.equal(copy.deepcopy(model).experts(*inputs), expected)


# --- while a model is pruned ----------------------------------------------------------------


@pytest.mark.parametrize("failing", [True, False])
def test_experts_without_a_packed_layer_are_fused_again(failing):
    model = block(gpt_oss)
    before = copy.deepcopy(model.state_dict())
    try:
        with unfused_experts(model):
            assert isinstance(model.experts, SparseExperts)
            if failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_experts_with_a_packed_layer_stay_apart_and_free_the_fused_memory():
    model = block(mixtral)
    storage = model.experts.down_proj.untyped_storage().data_ptr()
    inputs = routing()
    with unfused_experts(model):
        layer = model.experts.layers(0)[1]
        expected = model.experts(*inputs)
        replace_module(model, layer, pack_linear(layer, layer.weight.detach(), Bitmask()))
    assert isinstance(model.experts, SparseExperts)
    assert storage not in {p.untyped_storage().data_ptr() for p in model.parameters()}
    torch.testing.assert_close(model.experts(*inputs), expected)


@pytest.mark.parametrize("shared", ["gate_up_proj", "down_proj_bias"])
def test_experts_that_share_a_parameter_stay_fused(shared):
    model = nn.ModuleDict({name: block(gpt_oss) for name in "abc"})
    setattr(model["b"].experts, shared, getattr(model["a"].experts, shared))
    assert tied_experts(model) == {"a.experts", "b.experts"}
    with unfused_experts(model):
        apart = [isinstance(model[name].experts, SparseExperts) for name in "abc"]
    assert apart == [False, False, True]
    assert getattr(model["b"].experts, shared) is getattr(model["a"].experts, shared)


def test_experts_in_two_places_are_not_tied():
    model = nn.ModuleDict({"a": block(mixtral)})
    model["b"] = model["a"]
    assert not tied_experts(model)
    with unfused_experts(model):
        assert isinstance(model["b"].experts, SparseExperts)


def test_what_the_contract_does_not_describe_is_not_fused():
    experts = block(mixtral).experts
    assert is_fused(experts)
    assert not is_fused(nn.Linear(2, 2))
    experts._is_expert_parallel = True
    assert not is_fused(experts)
    experts._is_expert_parallel = False
    experts.down_proj = nn.Parameter(torch.zeros(EXPERTS - 1, HIDDEN, INNER))
    assert not is_fused(experts)
