"""A whole Llama with random weights, sparse against dense: speed, and memory when loaded.

The speed of a model doesn't depend on what its weights are, as long as sparse and dense hold the
same: random ones, pruned by magnitude, need no download. They are written once as a sparse and once
as an ordinary bf16 checkpoint, and loaded as users load them. Sparse and dense models of one dtype
take turns, round by round: a prompt, then greedy decoding with a cache, as `generate` does it.

Run as a script, `python -m hf_sparse_cli.bench.endtoend FOLDER THREADS`, it loads one checkpoint
and writes the memory that this took as JSON: only a fresh process has a peak of its own.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_sparse.checkpoint.dense_export import export_dense
from hf_sparse.config.sparse_config import SparseConfig
from hf_sparse.core.logging import progress_bar
from hf_sparse.evaluation.generation import time_generation
from hf_sparse.evaluation.memory import peak_resident, resident, weight_bytes
from hf_sparse.layers import sparse_layers
from hf_sparse.quantizer import prune

from .threads import torch_threads

_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
PRESETS: dict[str, dict[str, int]] = {
    name: dict(zip(_SHAPE, shape, strict=True))
    for name, shape in {
        "135m": (576, 1536, 30, 9, 3, 49152, True),  # as SmolLM-135M
        "1b": (2048, 8192, 16, 32, 8, 128256, True),  # as Llama-3.2-1B
        "1.1b": (2048, 5632, 22, 32, 4, 32000, False),  # as TinyLlama-1.1B
        "tiny": (64, 128, 2, 4, 2, 512, True),  # for tests
    }.items()
}
KINDS = ("dense", "sparse")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSettings:
    """Points to measure: `prompt` tokens, then `tokens` decoded ones, `rounds` times per model.

    The sparsity is that of the linear layers; embeddings and head stay dense. The sparse values are
    bf16 whatever is computed in.
    """

    presets: tuple[str, ...]
    sparsities: tuple[float, ...]
    threads: tuple[int, ...]
    dtypes: tuple[str, ...]
    prompt: int
    tokens: int
    rounds: int


@dataclass(frozen=True)
class SpeedPoint:
    """Sparse against dense in one dtype.

    Attributes:
        prefill_seconds, decode_seconds: medians, of the prompt and of a token, by kind.
        prefill_ratio, decode_ratio: how many times as fast sparse is.
        weight_bytes: of all resident parameters and buffers, each storage once, by kind.
        difference: largest one of the prompt's last logits, over the largest dense logit.
        kernels: how many sparse layers use which kernel ("dense": it measured faster here).
    """

    preset: str
    sparsity: float
    threads: int
    dtype: str
    prefill_seconds: dict[str, float]
    decode_seconds: dict[str, float]
    prefill_ratio: float
    decode_ratio: float
    weight_bytes: dict[str, int]
    difference: float
    kernels: dict[str, int]


@dataclass(frozen=True)
class MemoryPoint:
    """Resident bytes of a fresh process that loads a bf16 checkpoint, by kind; 0 if not Linux.

    Attributes:
        started: with everything imported.
        peak: the highest until the model was loaded.
        loaded: with the model loaded.
        used: after one token, which reads what until then was only mapped.
    """

    preset: str
    sparsity: float
    started: dict[str, int]
    peak: dict[str, int]
    loaded: dict[str, int]
    used: dict[str, int]


def measure(settings: ModelSettings) -> tuple[list[SpeedPoint], list[MemoryPoint]]:
    """All points. Takes disk in the temporary folder ($TMPDIR) for both checkpoints."""
    speed, memory = [], []
    for preset, sparsity in product(settings.presets, settings.sparsities):
        with tempfile.TemporaryDirectory() as folder:
            with torch_threads(max(settings.threads)):
                _write(Path(folder), preset, sparsity)
            for number in settings.threads:
                with torch_threads(number):
                    speed += _speed(settings, Path(folder), preset, sparsity)
            memory.append(_memory(Path(folder), preset, sparsity, settings.threads[0]))
    return speed, memory


def _write(folder: Path, preset: str, sparsity: float) -> None:
    """The two checkpoints, `folder`/dense and `folder`/sparse."""
    config = LlamaConfig(**PRESETS[preset], max_position_embeddings=4096)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    prune(model, SparseConfig(method="magnitude", sparsity=sparsity))
    model.save_pretrained(folder / "sparse")
    export_dense(model, folder / "dense")


def _load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _speed(settings: ModelSettings, folder: Path, preset: str, sparsity: float) -> list[SpeedPoint]:
    """One point per dtype. Kernels are chosen while loading, for the threads there are then."""
    threads = torch.get_num_threads()
    models = {
        (dtype, kind): _load(folder / kind, DTYPES[dtype])
        for dtype, kind in product(settings.dtypes, KINDS)
    }
    vocabulary = PRESETS[preset]["vocab_size"]
    prompt = torch.randint(
        vocabulary, (1, settings.prompt), generator=torch.Generator().manual_seed(0)
    )
    logits = {
        key: time_generation(model, prompt, 1)[2] for key, model in models.items()
    }  # warms up, too
    prefill: dict[tuple[str, str], list[float]] = {key: [] for key in models}
    decode: dict[tuple[str, str], list[float]] = {key: [] for key in models}
    bar = progress_bar(settings.rounds * len(models), f"{preset}, {sparsity}, {threads} threads")
    for _ in range(settings.rounds):
        for key, model in models.items():
            times = time_generation(model, prompt, settings.tokens)
            prefill[key].append(times[0])
            decode[key].append(times[1])
            bar.update(1)
    bar.close()
    points = []
    for dtype in settings.dtypes:
        dense, sparse = ((dtype, kind) for kind in KINDS)
        expected = logits[dense].float()
        seconds = {kind: median(prefill[dtype, kind]) for kind in KINDS}
        per_token = {kind: median(decode[dtype, kind]) for kind in KINDS}
        difference = (logits[sparse].float() - expected).abs().max() / expected.abs().max()
        points.append(
            SpeedPoint(
                preset,
                sparsity,
                threads,
                dtype,
                seconds,
                per_token,
                seconds["dense"] / seconds["sparse"],
                per_token["dense"] / per_token["sparse"],
                {kind: weight_bytes(models[dtype, kind]) for kind in KINDS},
                float(difference),
                dict(Counter(x.trace[-1].kernel for x in sparse_layers(models[sparse]).values())),
            )
        )
    return points


def _memory(folder: Path, preset: str, sparsity: float, threads: int) -> MemoryPoint:
    figures = {}
    for kind in KINDS:
        command = [sys.executable, "-m", __name__, str(folder / kind), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures[kind] = json.loads(done.stdout.splitlines()[-1])
    return MemoryPoint(
        preset,
        sparsity,
        *(
            {kind: figures[kind][what] for kind in KINDS}
            for what in ("started", "peak", "loaded", "used")
        ),
    )


def _report_memory(folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    started = resident()
    model = _load(folder, torch.bfloat16)
    gc.collect()
    figures = {"started": started, "peak": peak_resident(), "loaded": resident()}
    with torch.no_grad():
        model(torch.tensor([[1]]))
    figures["used"] = resident()
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    _report_memory(Path(sys.argv[1]), int(sys.argv[2]))
