"""Layers that may round their inputs: asked for while pruning, while loading or later."""

import logging

import pytest
import torch
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import ConfigError, SparseConfig
from hf_sparse.kernels.cpu import library
from hf_sparse.layers.linear import sparse_layers

if not library.available() or library.integer_path() == library.PLAIN_PATH:
    pytest.skip("no kernel rounds anything here", allow_module_level=True)

# transformers says that it takes this argument alone of a config passed for a sparse checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

IDS = torch.arange(1, 30)[None]


def coded(**changes) -> SparseConfig:
    return SparseConfig(method="magnitude", bits=8, group_size=8, **changes)


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama()
    hf_sparse.prune(model, coded())
    model.save_pretrained(tmp_path)
    return tmp_path


def kernels(model) -> set[str]:
    return {layer.trace[-1].kernel for layer in sparse_layers(model).values()}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def load(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)


def test_nothing_is_rounded_unless_it_is_asked_for(folder):
    assert "integer" not in kernels(load(folder))


def test_a_checkpoint_is_loaded_with_rounded_activations_where_the_user_wants(folder):
    exact = logits(load(folder))
    model = load(folder, quantization_config=SparseConfig(activations="int8"))
    assert kernels(model) == {"integer"}
    assert model.config.quantization_config.bits == 8
    found = logits(model)
    assert not torch.equal(found, exact)
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_loaded_model_changes_its_mind_and_back(folder):
    model = load(folder)
    exact = logits(model)
    hf_sparse.round_activations(model, "int8")
    assert kernels(model) == {"integer"}
    assert model.hf_quantizer.quantization_config.activations == "int8"
    hf_sparse.round_activations(model, None)
    assert "integer" not in kernels(model)
    assert torch.equal(logits(model), exact)


def test_pruning_and_saved_weights_are_the_same_without(folder, tmp_path):
    model = tiny_llama()
    hf_sparse.prune(model, coded(activations="int8"))
    assert kernels(model) == {"integer"}
    model.save_pretrained(tmp_path / "rounded")
    saved = [(tmp_path / place / "model.safetensors").read_bytes() for place in (".", "rounded")]
    # But for the id of the save.
    assert saved[0][-4096:] == saved[1][-4096:]
    assert kernels(load(tmp_path / "rounded")) == {"integer"}


def test_layers_without_codes_say_that_nothing_is_rounded(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_sparse"), "propagate", True)
    model = tiny_llama()
    hf_sparse.prune(model, SparseConfig(method="magnitude", activations="int8"))
    assert "activations='int8' rounds nothing here: takes codes" in caplog.text


def test_a_cast_model_rounds_still(folder):
    model = load(folder, quantization_config=SparseConfig(activations="int8")).bfloat16()
    assert kernels(model) == {"integer"}
    assert logits(model).dtype == torch.bfloat16


def test_what_nothing_can_be_rounded_to_is_refused():
    with pytest.raises(ConfigError, match="activations='int4' does not exist"):
        SparseConfig(activations="int4")
    with pytest.raises(ConfigError, match="activations='int4' does not exist"):
        hf_sparse.round_activations(tiny_llama(), "int4")
