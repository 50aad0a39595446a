"""Zeros, fewer bits, and both in one pass: what each leaves of a model's quality and bytes.

    python examples/sparse_plus_quantised.py [MODEL] [--bits 4] [--group-size 128]

MODEL is a folder or a Hub id of a causal language model; perplexity is measured on sequences of 256
tokens of text that was not used to calibrate.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparseConfig, perplexity

HERE = Path(__file__).parent
MODEL = HERE / "models" / "tiny-llama-docs"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune and quantise in one pass.")
    parser.add_argument("model", nargs="?", default=str(MODEL))
    parser.add_argument("--method", default="fast")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--evaluation-samples", type=int, default=64)
    given = parser.parse_args()
    grid = {"bits": given.bits, "group_size": given.group_size}
    variants: dict[str, dict] = {
        f"{given.sparsity:.0%} zeros": {"sparsity": given.sparsity},
        f"{given.bits} bits": {"sparsity": 0.0, **grid},
        "both": {"sparsity": given.sparsity, **grid},
    }
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    pages = (HERE / "data" / "evaluation.txt").read_text().split("\n\n\0\n")
    for name, arguments in variants.items():
        config = SparseConfig(
            method=given.method, dataset=str(HERE / "data" / "calibration.txt"),
            num_samples=given.num_samples, seq_len=256, **arguments,
        )  # fmt: skip
        pruned = AutoModelForCausalLM.from_pretrained(given.model, quantization_config=config)
        report = pruned.hf_quantizer.report
        with tempfile.TemporaryDirectory() as folder:
            pruned.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder)  # as a user of it would
        quality = perplexity(model, tokenizer, pages, 256, num_samples=given.evaluation_samples)
        share = report.bytes_after / report.bytes_before
        print(f"{name:<10} perplexity {quality.perplexity:.2f}, pruned layers {share:.3f} of dense")


if __name__ == "__main__":
    main()
