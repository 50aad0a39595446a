"""Statistics of whole experts, against a computation in double precision from the weights."""

import pytest
import torch
from tiny_models import MIXTURE, drawn, tiny_mixtral
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import hf_sparse
from hf_sparse import CalibrationError, SparseConfig
from hf_sparse.calibration.batches import Batch
from hf_sparse.layers.experts import unfused_experts
from hf_sparse.layers.mixtures import find_mixtures
from hf_sparse.pruning.dense_measurements import DenseMeasurements


def qwen2_moe():
    """Gates don't; an expert that all tokens go to beside the others."""
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 20}
    return drawn(Qwen2MoeForCausalLM(Qwen2MoeConfig(**MIXTURE, **sizes, num_experts=5)))


def gpt_oss():
    """Transposed, with biases and a gate of their own."""
    return drawn(GptOssForCausalLM(GptOssConfig(**MIXTURE, num_local_experts=4, sliding_window=16)))


def switch():
    """Experts that are modules, of which a token goes to one."""
    config = SwitchTransformersConfig(
        vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_sparse_encoder_layers=1,
        num_decoder_layers=2, num_sparse_decoder_layers=1, num_heads=2, num_experts=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    return drawn(SwitchTransformersForConditionalGeneration(config))


def measured(model, batches: list[Batch]):
    measurements = DenseMeasurements(None)
    measurements.__class__ = type("Given", (DenseMeasurements,), {"batches": tuple(batches)})
    with unfused_experts(model), torch.no_grad():
        return measurements.experts(model, find_mixtures(model))


def expected_of_fused(model, batches):
    """From what the fused experts are handed: each expert's outputs for all tokens, weighed."""
    model = model.double()
    model.set_experts_implementation("eager")
    found = {}
    for name, experts in model.named_modules():
        if name.endswith("experts"):
            found[name] = torch.zeros(3, experts.num_experts, dtype=torch.float64)
            experts.register_forward_hook(lambda m, args, out, name=name: add(found[name], m, args))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return found


def add(sums, experts, args):
    x, chosen, gates = args
    for expert in range(experts.num_experts):
        one = torch.zeros(len(x), 1, dtype=torch.long) + expert
        y = type(experts).forward(experts, x, one, torch.ones(len(x), 1, dtype=torch.float64))
        weight = (gates * (chosen == expert)).sum(dim=1)
        norm, routed = y.norm(dim=1), (chosen == expert).any(dim=1)
        sums[:, expert] += torch.stack([routed.sum(), norm[routed].sum(), (weight * norm).sum()])


@pytest.mark.parametrize("make", [tiny_mixtral, qwen2_moe, gpt_oss])
def test_they_are_those_of_double_precision(make, token_ids):
    batches = [{"input_ids": ids} for ids in token_ids.split(5)]
    found = measured(make(), batches)
    expected = expected_of_fused(make(), batches)
    assert found.keys() == expected.keys()
    for name, seen in found.items():
        tokens, norms, gated = expected[name]
        assert seen.tokens.tolist() == tokens.tolist()
        torch.testing.assert_close(seen.norms, norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(seen.gated_norms, gated, rtol=1e-5, atol=0)
        assert (seen.entered, seen.chosen) == (token_ids.numel(), 2)


def test_they_are_those_of_double_precision_for_experts_that_are_modules(token_ids):
    batches = [{"input_ids": ids, "decoder_input_ids": ids[:, :7]} for ids in token_ids.split(5)]
    found = measured(switch(), batches)
    model, expected = switch().double(), {}

    def add(name, experts, args):
        x, chosen, gates = args
        for index, expert in enumerate(experts.values()):
            routed = chosen[:, 0, index] == 1
            norm = expert(x[routed]).norm(dim=1)
            new = torch.stack([routed.sum(), norm.sum(), (norm * gates[routed, 0]).sum()])
            expected[name][:, index] += new

    for name, module in model.named_modules():
        if name in found:
            expected[name] = torch.zeros(3, 3, dtype=torch.float64)
            module.register_forward_pre_hook(lambda m, args, name=name: add(name, m, args))
    model.encoder.router_dtype = model.config.router_dtype
    for module in model.modules():
        if hasattr(module, "jitter_noise"):
            module.dtype = torch.float64
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for name, seen in found.items():
        tokens, norms, gated = expected[name]
        assert seen.tokens.tolist() == tokens.tolist()
        torch.testing.assert_close(seen.norms, norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(seen.gated_norms, gated, rtol=1e-5, atol=0)
        assert seen.chosen == 1


def test_padding_does_not_count(token_ids):
    padded = torch.zeros(3, 16, dtype=torch.long)
    mask = torch.zeros(3, 16, dtype=torch.long)
    rows = [token_ids[i, :length] for i, length in enumerate((16, 9, 4))]
    for i, row in enumerate(rows):
        padded[i, : len(row)], mask[i, : len(row)] = row, 1
    found = measured(tiny_mixtral(), [{"input_ids": padded, "attention_mask": mask}])
    alone = measured(tiny_mixtral(), [{"input_ids": row[None]} for row in rows])
    for name, seen in found.items():
        assert seen.entered == alone[name].entered == 29
        assert seen.tokens.tolist() == alone[name].tokens.tolist()
        torch.testing.assert_close(seen.gated_norms, alone[name].gated_norms, rtol=1e-5, atol=0)


def test_the_model_computes_the_same_meanwhile_and_keeps_no_graph(token_ids):
    model, outputs = tiny_mixtral(), []
    model.model.layers[1].register_forward_hook(lambda m, args, out: outputs.append(out))
    measured(model, [{"input_ids": token_ids}])
    with torch.no_grad():
        model(token_ids)
    assert len(outputs) > 2
    assert all(torch.equal(out, outputs[-1]) for out in outputs)
    assert not any(out.requires_grad for out in outputs)


def test_an_expert_with_infinite_outputs_is_an_error_that_names_it(token_ids):
    model = tiny_mixtral()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] *= 1e38
        model.model.layers[1].mlp.experts.gate_up_proj[2] *= 1e5
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.experts give NaN or infinite"):
        hf_sparse.prune(model, SparseConfig(experts=0.25, dataset=token_ids))
    assert model.config.num_local_experts == 4
