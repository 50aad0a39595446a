"""Train a LoRA adapter on a sparse checkpoint, merge it, and see what each step came to.

    python examples/finetune_lora.py [--steps 64] [--output DIR]

The dense model teaches the sparse one. Perplexity is of 32 x 256 tokens of other text.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_sparse import SparseConfig, merge_adapter, perplexity
from hf_sparse.training import SparseTrainer

HERE = Path(__file__).parent
MODEL, TEXT = HERE / "models" / "tiny-llama-docs", HERE / "data" / "calibration.txt"


def quality(name: str, model, tokenizer) -> None:
    pages = (HERE / "data" / "evaluation.txt").read_text().split("\n\n\0\n")
    found = perplexity(model, tokenizer, iter(pages), 256, num_samples=32, batch_size=8)
    print(f"{name:<7} perplexity {found.perplexity:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=64, help="of training")
    parser.add_argument("--output", type=Path, help="keep the merged checkpoint here")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    data = {"dataset": str(TEXT), "num_samples": 32, "seq_len": 256}
    config = SparseConfig(sparsity=0.6, **data)
    pruned = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
    ids = torch.tensor(tokenizer(TEXT.read_text())["input_ids"])
    rows = [{"input_ids": row, "labels": row} for row in ids[: len(ids) // 256 * 256].view(-1, 256)]
    with tempfile.TemporaryDirectory() as folder:
        pruned.save_pretrained(folder)
        sparse = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        quality("sparse", sparse, tokenizer)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        arguments = TrainingArguments(
            folder, max_steps=given.steps, per_device_train_batch_size=4, learning_rate=1e-3,
            lr_scheduler_type="cosine", warmup_steps=3, save_strategy="no", report_to=[],
        )  # fmt: skip
        adapted = get_peft_model(sparse, lora)
        dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        SparseTrainer(adapted, arguments, train_dataset=rows, teacher=dense).train()
        quality("adapted", adapted, tokenizer)
        merged = merge_adapter(adapted, "resolve", tokenizer=tokenizer, **data)
        quality("merged", merged, tokenizer)
        print(merged.merge_report.summary())
        merged.save_pretrained(given.output or folder)


if __name__ == "__main__":
    main()
