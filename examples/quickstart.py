"""Prune a small real model while it loads, save it, load it again, and see what came of it.

    python examples/quickstart.py [--sparsity 0.5] [--output DIR]

Perplexity is measured on 64 sequences of 256 tokens of text that was not used to prune.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparseConfig, generation_speed, perplexity

HERE = Path(__file__).parent
MODEL = HERE / "models" / "tiny-llama-docs"
PROMPT = "The function returns"


def describe(name: str, model, tokenizer, folder: Path) -> None:
    """Print perplexity, bytes, generation speed and a piece of generated text."""
    pages = (HERE / "data" / "evaluation.txt").read_text().split("\n\n\0\n")
    quality = perplexity(model, tokenizer, iter(pages), 256, num_samples=64, batch_size=8)
    speed = generation_speed(model, prompt_tokens=16, new_tokens=48)
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{name:<7} perplexity {quality.perplexity:.2f}, {on_disk / 1e6:.2f} MB on disk, "
          f"{speed.weight_bytes / 1e6:.2f} MB in memory, "
          f"{speed.tokens_per_second:.0f} tokens/s")  # fmt: skip
    prompt = tokenizer(PROMPT, return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=48, do_sample=False)[0])
    print(f"        {text!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.5, help="of each layer")
    parser.add_argument("--output", type=Path, help="keep the sparse checkpoint here")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = SparseConfig(
        sparsity=arguments.sparsity,
        dataset=str(HERE / "data" / "calibration.txt"),
        num_samples=32,
        seq_len=256,
    )
    pruned = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
    print(pruned.hf_quantizer.report.summary())
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        pruned.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        sparse = AutoModelForCausalLM.from_pretrained(folder)
        dense = AutoModelForCausalLM.from_pretrained(MODEL)
        describe("dense", dense, tokenizer, MODEL)
        describe("sparse", sparse, tokenizer, folder)


if __name__ == "__main__":
    main()
