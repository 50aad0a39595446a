"""TRL's trainers take a sparse model: with an adapter, and with its kept values as parameters."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparseConfig
from hf_sparse.checkpoint.state_dict import sparse_state_dict
from hf_sparse.training import finish_training, prepare_for_training

trl = pytest.importorskip("trl", reason="TRL is no dependency")
pytestmark = [
    pytest.mark.slow,
    # TRL's and its dependencies' own.
    pytest.mark.filterwarnings("ignore"),
]

SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "max_length": 32,
}
TEXTS = [f"The layer number {number} is sparse." for number in range(8)]


def trainer_of(kind, model, tokenizer, folder, peft_config):
    from datasets import Dataset

    if kind == "SFT":
        data = Dataset.from_dict({"text": TEXTS})
        arguments = trl.SFTConfig(output_dir=str(folder), **SETTINGS)
        make = trl.SFTTrainer
    else:
        data = {"prompt": TEXTS, "chosen": [" Yes."] * 8, "rejected": [" Not at all."] * 8}
        data = Dataset.from_dict(data)
        arguments = trl.DPOConfig(output_dir=str(folder), **SETTINGS)
        make = trl.DPOTrainer
    return make(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def sparse_and_copy(trained, tmp_path):
    hf_sparse.prune(trained, SparseConfig(method="magnitude"))
    trained.save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base"), sparse_state_dict(trained)[0]


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_an_adapter_trains_and_the_base_stays(kind, trained, tokenizer, tmp_path):
    model, before = sparse_and_copy(trained, tmp_path)
    trainer = trainer_of(kind, model, tokenizer, tmp_path, LoraConfig(r=2, task_type="CAUSAL_LM"))
    trainer.train()
    adapted = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert adapted
    assert all(bool(p.any()) for p in adapted)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    after = sparse_state_dict(trainer.model.unload())[0]
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_kept_values_train_and_the_pattern_stays(kind, trained, tokenizer, tmp_path):
    model, before = sparse_and_copy(trained, tmp_path)
    prepare_for_training(model)
    trainer = trainer_of(kind, model, tokenizer, tmp_path, None)
    trainer.train()
    finish_training(model)
    model.save_pretrained(tmp_path / "trained")
    after = sparse_state_dict(AutoModelForCausalLM.from_pretrained(tmp_path / "trained"))[0]
    assert not any(
        torch.equal(after[key], before[key]) for key in before if key.endswith("up_proj.weight")
    )
    masks = [key for key in before if key.endswith("bitmask")]
    assert masks
    assert all(torch.equal(after[key], before[key]) for key in masks)


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_fixed_values_without_an_adapter_are_refused(kind, trained, tokenizer, tmp_path):
    model, _ = sparse_and_copy(trained, tmp_path)
    with pytest.raises(ValueError, match="adapter"):
        trainer_of(kind, model, tokenizer, tmp_path, None)
