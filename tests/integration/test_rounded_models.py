"""Pruning and rounding in one run, from the config to the reloaded checkpoint."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparseConfig
from hf_sparse.core.errors import ConfigError


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(1, 4096, (6, 48), generator=generator))


def load(model_path, config):
    return AutoModelForCausalLM.from_pretrained(model_path, quantization_config=config)


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "sparsegpt", "sparsity": 0.5, "bits": 4},
        {"method": "sparsegpt", "sparsity": 0.5, "bits": 4, "group_size": -1, "sym": False},
        {"method": "fast", "sparsity": 0.5, "bits": 8},
        {"method": "fast", "pattern": "2:4", "bits": 3, "group_size": 64},
        {"method": "magnitude", "sparsity": 0.5, "bits": 4},
        {"method": "sparsegpt", "sparsity": 0.0, "bits": 4},
    ],
    ids=str,
)
def test_a_rounded_model_reloads_to_the_same_logits(model_path, samples, tmp_path, arguments):
    dataset = None if arguments["method"] == "magnitude" else samples
    model = load(model_path, SparseConfig(dataset=dataset, targets=["layers.0"], **arguments))
    layers = model.hf_quantizer.report.layers
    assert len(layers) == 7
    for layer in layers:
        assert layer.sparsity >= arguments.get("sparsity", 0.5)
        assert layer.format.startswith(f"{arguments['bits']}-bit")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(samples[0][None]).logits, model(samples[0][None]).logits)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.22), (8, 0.33)])
def test_half_of_the_weights_in_few_bits_take_a_fraction_of_dense_bf16(
    model_path, samples, bits, most
):
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    config = SparseConfig(bits=bits, dataset=samples, targets=["layers.1"])
    report = hf_sparse.prune(model, config)
    assert report.bytes_after <= most * report.bytes_before


def test_rounding_alone_keeps_every_weight_that_is_not_small(model_path, samples):
    dense = AutoModelForCausalLM.from_pretrained(model_path)
    before = dense.model.layers[0].mlp.up_proj.weight.detach().clone()
    config = SparseConfig(sparsity=0.0, bits=8, dataset=samples, targets=["layers.0.mlp.up_proj"])
    hf_sparse.prune(dense, config)
    after = dense.model.layers[0].mlp.up_proj.weight
    assert float((after - before).norm() / before.norm()) < 0.02
    assert float((after == 0).double().mean()) < 0.02


def test_a_method_that_changes_no_weight_takes_no_bits():
    with pytest.raises(ConfigError, match="nor bits"):
        SparseConfig(method="keep", bits=4)
