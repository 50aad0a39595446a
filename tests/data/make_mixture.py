"""Trains a tiny Mixtral on the bytes of the fixtures' text, and prunes it: perplexities.

Each layer to 50 %; then it loses whole experts; then experts, weights and bits.

    python tests/data/make_mixture.py

It takes about a minute and a half on one core. Two thirds of the 886400 parameters are experts', so
that these matter. The scales of the norms start log-normal: the features that enter its layers then
differ in size as a large model's do, which is what Wanda's scores are about. Slow tests train the
same model; its weights are kept nowhere.
"""

import math
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

from hf_sparse import SparseConfig
from hf_sparse.pruning.whole_experts.choice import SCORES

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
METHODS = ("magnitude", "wanda", "sparsegpt")
LENGTH, STEPS, BATCH, RATE = 128, 500, 16, 4e-3
SPREAD = 0.8  # of the logarithms of the norms' scales
EVALUATED = 64
# Share of experts removed, zeros inside, bits: by bytes.
COMBINED = (
    (None, 0.0, 4),
    (0.25, 0.0, 4),
    (None, 0.0, 3),
    (None, 0.5, 4),
    (None, 0.6, 4),
    (0.25, 0.5, 4),
    (None, 0.7, 4),
)


def read_bytes(name):
    """A text of the fixtures as sequences of bytes, (sequences, LENGTH)."""
    found = torch.tensor(list((FIXTURES / name).read_bytes()))
    return found[: len(found) // LENGTH * LENGTH].view(-1, LENGTH)


def train():
    """The model, always the same on one machine."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        output_router_logits=True,  # balances the experts
        router_aux_loss_coef=0.01,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = MixtralForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.exp(SPREAD * torch.randn_like(parameter))
    text = read_bytes("calibration.txt").flatten()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    for _ in range(STEPS):
        starts = torch.randint(len(text) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([text[start : start + LENGTH] for start in starts])
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.config.output_router_logits = False
    return model.eval()


@torch.no_grad()
def perplexity(model):
    """Of a byte of the evaluation text."""
    losses = [model(b, labels=b).loss for b in read_bytes("evaluation.txt")[:EVALUATED].split(16)]
    return math.exp(torch.stack(losses).mean())


def pruned(folder, method, targets=None, dtype=torch.float32):
    """The model saved in a folder, pruned as it is loaded."""
    data = read_bytes("calibration.txt")[:128]
    config = SparseConfig(method=method, dataset=data, batch_size=16, targets=targets)
    return MixtralForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def with_fewer(folder, experts, score="reap", **settings):
    """The model with a share of its experts removed; of a number for a score, at random."""
    data = read_bytes("calibration.txt")[:128]
    config = SparseConfig(experts=experts, dataset=data, batch_size=16, **settings)
    load = MixtralForCausalLM.from_pretrained
    if score in SCORES:
        return load(folder, quantization_config=config.replaced(expert_score=score))
    generator = torch.Generator().manual_seed(score)
    with patch.dict(SCORES, reap=lambda seen: torch.rand(seen.norms.shape, generator=generator)):
        return load(folder, quantization_config=config)


def main():
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = train()
    sys.stdout.write(f"dense {perplexity(model):.3f}\n")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for targets in (None, ["experts"]):
            for method in METHODS:
                found = perplexity(pruned(folder, method, targets=targets))
                sys.stdout.write(f"{targets or 'all'} {method} {found:.3f}\n")
        for share in (0.25, 0.5):
            for score in (*SCORES, 0, 1, 2):
                found = perplexity(with_fewer(folder, share, score))
                sys.stdout.write(f"experts={share} {score} {found:.3f}\n")
        for experts, sparsity, bits in COMBINED:
            model = with_fewer(folder, experts, sparsity=sparsity, bits=bits, group_size=64)
            held = model.hf_quantizer.report.bytes_after
            sys.stdout.write(f"experts={experts}, sparsity={sparsity}, bits={bits}: ")
            sys.stdout.write(f"{held} bytes, {perplexity(model):.3f}\n")


if __name__ == "__main__":
    main()
