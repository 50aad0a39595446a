"""How much of what pruning cost full fine-tuning brings back; minutes: run with -m slow.

A 60 % SparseGPT model of the fixtures is trained once over the calibration text, 2048 tokens a
step, its perplexity measured on the 256 sequences that examples/reference_figures.py uses.
"""

import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import hf_sparse
from conftest import FIXTURES, ROOT
from hf_sparse import SparseConfig, SparseLinear, perplexity
from hf_sparse.training import SparseTrainer, SparsityCallback, finish_training

sys.path.insert(0, str(ROOT / "examples"))
import reference_figures as figures

SEQUENCES = 640
# Learning rate, weight of both terms of the teacher, least recovered. Labels alone give a gradient
# that is mostly noise after so few tokens: larger steps do harm.
RUNS = {"labels": (3e-5, None, 0.05), "teacher": (2e-4, 100.0, 0.5)}


def load():
    folder = FIXTURES / "tiny-llama-docs"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def zeros_of(model):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    return {name: layer.weight == 0 for name, layer in layers.items()}


@pytest.mark.slow
@pytest.mark.skipif(not FIXTURES.exists(), reason="needs the fixtures folder")
@pytest.mark.parametrize("run", RUNS)
def test_training_what_is_kept_recovers_perplexity(run, tmp_path, capsys):
    rate, weight, least = RUNS[run]
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tiny-llama-docs")
    tokens = figures.token_stream(tokenizer, FIXTURES / "calibration.txt", SEQUENCES)
    evaluation = list(figures.token_stream(tokenizer, FIXTURES / "evaluation.txt", 256))

    def quality(model):
        return perplexity(model, None, evaluation, 256, batch_size=8).perplexity

    model, dense = load(), quality(load())
    hf_sparse.prune(model, SparseConfig(sparsity=0.6, dataset=list(tokens[:128])))
    pruned, zeros = quality(model), zeros_of(model)
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=8, learning_rate=rate,
        lr_scheduler_type="cosine", warmup_steps=0.1, weight_decay=0.0, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    teacher = {"teacher": load(), "kl_weight": weight, "hidden_weight": weight} if weight else {}
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = SparseTrainer(
        model, arguments, train_dataset=rows, callbacks=[SparsityCallback()], **teacher
    )
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    finish_training(model)
    trained = quality(model)
    recovered = (pruned - trained) / (pruned - dense)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{run}: dense {dense:.2f}, pruned {pruned:.2f}, trained {trained:.2f}, recovered "
            f"{recovered:.0%} in {trainer.state.global_step} steps, {seconds:.0f} s of one thread\n"
        )
    assert recovered >= least
    found = zeros_of(model)
    assert all(torch.equal(found[name], before) for name, before in zeros.items())
