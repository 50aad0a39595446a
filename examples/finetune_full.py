"""Prune a small model to 60 %, train the weights that are left, save it exactly as sparse.

    python examples/finetune_full.py [--steps 40] [--output DIR]

The dense model teaches the sparse one. Perplexity is measured on 32 sequences of 256 tokens of
other text than what was trained on.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_sparse import SparseConfig, perplexity
from hf_sparse.training import SparseTrainer, SparsityCallback, finish_training

HERE = Path(__file__).parent
MODEL, TEXT = HERE / "models" / "tiny-llama-docs", HERE / "data" / "calibration.txt"


def quality(name: str, model, tokenizer) -> None:
    """Print a model's perplexity."""
    pages = (HERE / "data" / "evaluation.txt").read_text().split("\n\n\0\n")
    found = perplexity(model, tokenizer, iter(pages), 256, num_samples=32, batch_size=8)
    print(f"{name:<7} perplexity {found.perplexity:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="of training")
    parser.add_argument("--output", type=Path, help="keep the sparse checkpoint here")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = SparseConfig(sparsity=0.6, dataset=str(TEXT), num_samples=32, seq_len=256)
    load = {"pretrained_model_name_or_path": MODEL, "dtype": torch.float32}
    dense = AutoModelForCausalLM.from_pretrained(**load)
    sparse = AutoModelForCausalLM.from_pretrained(**load, quantization_config=config)
    quality("dense", dense, tokenizer)
    quality("pruned", sparse, tokenizer)
    ids = torch.tensor(tokenizer(TEXT.read_text())["input_ids"])
    rows = [{"input_ids": row, "labels": row} for row in ids[: len(ids) // 256 * 256].view(-1, 256)]
    with tempfile.TemporaryDirectory() as temporary:
        arguments = TrainingArguments(
            temporary, max_steps=given.steps, learning_rate=1e-4, warmup_steps=0.1,
            lr_scheduler_type="cosine", save_strategy="no", report_to=[],
        )  # fmt: skip
        callbacks = [SparsityCallback()]
        SparseTrainer(
            sparse, arguments, train_dataset=rows, callbacks=callbacks, teacher=dense
        ).train()
        finish_training(sparse)
        quality("trained", sparse, tokenizer)
        sparse.save_pretrained(given.output or temporary)


if __name__ == "__main__":
    main()
