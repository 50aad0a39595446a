"""Compare methods of pruning on a model of yours: perplexity, time and bytes over sparsity.

    python examples/compare_methods.py MODEL --calibration FILE --evaluation FILE [--output DIR]

MODEL is a folder or a Hub id of a causal language model; the files hold text (txt, jsonl or
parquet). Prints a table; DIR gets it as Markdown and JSON, and a plot, which needs matplotlib.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM

from hf_sparse import compare


def fraction_or_pattern(text: str) -> float | str:
    """0.5, or "2:4"."""
    return text if ":" in text else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare methods of pruning on one model.")
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt", "fast"])
    parser.add_argument(
        "--sparsities", nargs="+", type=fraction_or_pattern, default=[0.5, 0.6, "2:4"]
    )
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--evaluation-samples", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    result = compare(
        lambda: AutoModelForCausalLM.from_pretrained(given.model),  # one in memory at a time
        given.methods,
        given.sparsities,
        given.evaluation,
        eval_samples=given.evaluation_samples,
        dataset=given.calibration,
        num_samples=given.num_samples,
        seq_len=given.seq_len,
        batch_size=given.batch_size,
    )
    print(result)
    if given.output:
        result.save(given.output)


if __name__ == "__main__":
    main()
