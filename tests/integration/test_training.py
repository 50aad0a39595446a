"""Adapters and Trainer on top of sparse layers."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from short_runs import arguments, rows_of
from transformers import AutoModelForCausalLM, Trainer

import hf_sparse
from hf_sparse import SparseConfig, SparseLinear


@pytest.fixture
def sparse(tiny):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", sparsity=0.5))
    return tiny


def train(model, token_ids, folder, steps=3):
    settings = arguments(folder, max_steps=steps)
    trainer = Trainer(model=model, args=settings, train_dataset=rows_of(token_ids))
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lora_trains_on_sparse_layers_and_leaves_them_as_they_are(sparse, token_ids, tmp_path):
    before = {n: b.clone() for n, b in sparse.named_buffers()}
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(sparse, config)
    wrapped = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(wrapped.base_layer, SparseLinear)
    with torch.no_grad():
        loss = model(token_ids, labels=token_ids).loss
    train(model, token_ids, tmp_path / "run", steps=8)
    with torch.no_grad():
        assert model(token_ids, labels=token_ids).loss < loss
    after = {n.replace(".base_layer", ""): b for n, b in model.get_base_model().named_buffers()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_adapter_reloads_on_the_reloaded_sparse_base(sparse, token_ids, tmp_path):
    sparse.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["up_proj"]))
    train(model, token_ids, tmp_path / "run")
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    with torch.no_grad():
        torch.testing.assert_close(again(token_ids).logits, model(token_ids).logits)


def test_training_the_packed_weights_themselves_is_refused(sparse, token_ids, tmp_path):
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        train(sparse, token_ids, tmp_path)
