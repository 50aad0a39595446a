"""Accuracy of each sparse attention on ListOps of Long Range Arena (Tay et al. 2021), generated.

    python examples/listops.py [--steps 1000] [--seeds 3]

Trains a small encoder with exact attention on expressions such as [MAX 2 9 [MIN 4 7 ] 0 ], whose
value is a digit, and measures every method with a quarter of the keys at two lengths.
"""

import argparse
import random
from statistics import mean, median

import torch
from transformers import BertConfig, BertForSequenceClassification

import hf_sparse
from hf_sparse.core.attention_settings import METHODS

LENGTHS = (128, 256)
OPERATORS = {"[MIN": min, "[MAX": max, "[MED": median, "[SM": sum}
WORDS = ["PAD", "CLS", "]", *OPERATORS, *map(str, range(10))]
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_labels": 10}
SIZES |= {"vocab_size": len(WORDS), "intermediate_size": 128}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def expression(draw: random.Random, length: int) -> tuple[list[str], int]:
    """An expression of at most `length` words, and its value."""
    if length < 5:
        return [str(digit := draw.randrange(10))], digit
    operator, words, values = draw.choice(list(OPERATORS)), [], []
    for left in range(draw.randint(2, min(10, length - 2)), 0, -1):
        most = (length - 2 - len(words)) // left
        part, value = expression(draw, most if draw.random() < 0.7 else 1)
        words, values = words + part, [*values, value]
    return [operator, *words, "]"], int(OPERATORS[operator](values)) % 10


def batch(draw: random.Random, length: int, count: int) -> dict[str, torch.Tensor]:
    ids, labels = torch.zeros(count, length, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    for i in range(count):
        words, labels[i] = expression(draw, length - 1)
        ids[i, : len(words) + 1] = torch.tensor([1, *map(WORDS.index, words)])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def train(seed: int, steps: int) -> BertForSequenceClassification:
    """An encoder that has seen `steps` batches of 32 expressions, every fourth of the longer ones.

    The learning rate rises over 200 steps and falls to nothing.
    """
    torch.manual_seed(seed)
    draw, model = random.Random(seed), BertForSequenceClassification(BertConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 200) * (1 - step / steps)
    )
    for step in range(steps):
        model(**batch(draw, LENGTHS[step % 4 == 3], 32)).loss.backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model: BertForSequenceClassification, method: str, length: int) -> float:
    """Share of 500 expressions, always the same ones, whose value is found."""
    test = batch(random.Random(length), length, 500)
    settings = {"method": method, "keys": length // 4, "block": 16, "key_block": 4}
    chosen = None if method == "exact" else settings | {"from_length": 0}
    hf_sparse.use_attention(model, chosen, list(test["input_ids"][:8]))
    return float((model(**test).logits.argmax(dim=-1) == test["labels"]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--seeds", type=int, default=3, help="models that are trained")
    given = parser.parse_args()
    models = [train(seed, given.steps) for seed in range(given.seeds)]
    for method in ("exact", *METHODS):
        for length in LENGTHS:
            found = [accuracy(model, method, length) for model in models]
            each = " ".join(f"{share:.3f}" for share in found)
            print(f"{method:<15} {length} words: {mean(found):.3f} ({each})", flush=True)


if __name__ == "__main__":
    main()
