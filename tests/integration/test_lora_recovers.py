"""What a LoRA adapter recovers of the quality that pruning cost, and what merging it leaves.

Minutes, on the trained model beside the repository: run with -m slow.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import hf_sparse
from conftest import FIXTURES
from hf_sparse import SparseConfig
from hf_sparse.layers import sparse_layers
from hf_sparse.training import SparseTrainer

SEQUENCE = 256

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FIXTURES.exists(), reason="the fixtures are not beside the repository"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@torch.no_grad()
def logits_error(model, unmerged, rows):
    """|difference| / |unmerged| of the logits on all rows."""
    squares = torch.zeros(2, dtype=torch.float64)
    for batch in rows.split(8):
        expected = unmerged(batch).logits
        difference = model(batch).logits - expected
        squares += torch.stack([difference.square().sum(), expected.square().sum()])
    return float((squares[0] / squares[1]).sqrt())


def sequences(tokenizer, name, count):
    """The first sequences of a file's pages, each page after id 0."""
    stream = []
    for page in (FIXTURES / name).read_text().split("\n\n\0\n"):
        stream += [0, *tokenizer(page, add_special_tokens=False)["input_ids"]]
    return torch.tensor(stream[: count * SEQUENCE]).view(count, SEQUENCE)


def test_lora_recovers_a_third_of_what_pruning_cost_and_the_merged_model_is_as_sparse(tmp_path):
    folder = FIXTURES / "tiny-llama-docs"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration = sequences(tokenizer, "calibration.txt", 256)
    evaluation = list(sequences(tokenizer, "evaluation.txt", 256)[::4])

    def perplexity(model):
        return hf_sparse.perplexity(model, None, evaluation, SEQUENCE, batch_size=8).perplexity

    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sparse = copy.deepcopy(dense)
    data = {"dataset": list(calibration[:128])}
    hf_sparse.prune(sparse, SparseConfig(sparsity=0.6, **data))
    patterns = {name: layer.sparse_weight != 0 for name, layer in sparse_layers(sparse).items()}
    before, best = perplexity(sparse), perplexity(dense)

    torch.manual_seed(0)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(sparse, lora)
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, learning_rate=1e-3,
        lr_scheduler_type="cosine", warmup_steps=3, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in calibration]
    teach = {"teacher": dense, "kl_weight": 10, "hidden_weight": 10}
    SparseTrainer(adapted, arguments, train_dataset=rows, **teach).train()
    adapted.eval()
    recovered = {"adapted": (before - perplexity(adapted)) / (before - best)}

    for policy in ("masked", "resolve"):
        merged = hf_sparse.merge_adapter(copy.deepcopy(adapted), policy, **data)
        layers = sparse_layers(merged)
        assert layers.keys() == patterns.keys()
        assert all(torch.equal(layers[n].sparse_weight != 0, m) for n, m in patterns.items())
        recovered[policy] = (before - perplexity(merged)) / (before - best)
        reported = merged.merge_report.fidelity.output_error
        assert logits_error(merged, adapted, calibration[:128]) == pytest.approx(reported, rel=0.01)
    assert recovered["adapted"] >= 0.3
    assert recovered["resolve"] > recovered["masked"]
