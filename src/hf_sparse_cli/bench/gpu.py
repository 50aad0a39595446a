"""What an NVIDIA GPU gains, each point of it measured: `hf-sparse bench gpu`.

Single products are timed in CUDA graphs over copies of the weight that together exceed the L2 cache
several times, sparse and dense in the same way, and compared with the product in double precision
first. The share of the copy bandwidth is the weight's bytes, each read once, over the time, over
what a large copy moves, reads and writes counted.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sparse.config.sparse_config import SparseConfig
from hf_sparse.core.logging import progress_bar
from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.core.statistics import Statistics
from hf_sparse.evaluation.memory import weight_bytes
from hf_sparse.formats.bitmask import Bitmask
from hf_sparse.formats.n_of_m import NMPacked
from hf_sparse.kernels import Stored
from hf_sparse.kernels.gpu import timing
from hf_sparse.kernels.gpu.kernel import SlicedKernel
from hf_sparse.kernels.gpu.product import WAYS
from hf_sparse.kernels.gpu.semi_structured import SemiStructuredWeight
from hf_sparse.layers.explain import explain
from hf_sparse.quantizer import prune
from hf_sparse.solvers.sparsegpt import SparseGPT

from ..failures import Failure

DEVICE = "cuda"
COPIED_BYTES = 4 << 30
DECODE_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
PREFILL_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
PREFILL_TOKENS = 4096
SOLVED = (4096, 11008)
VOCABULARY = 32000
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": VOCABULARY,
}
NEW_TOKENS = 128
CALIBRATION = (128, 2048)
FEW_BLOCKS = 4
ROUNDS = 3


@dataclass(frozen=True)
class ProductPoint:
    """A sparse product against cuBLAS in bf16.

    Attributes:
        what: "sliced", a way of it, or "2:4".
        bandwidth: share of the copy bandwidth that the weight alone takes.
        difference: norm of the difference to the product in double precision, relative.
    """

    what: str
    shape: tuple[int, int]
    sparsity: float
    tokens: int
    seconds: float
    dense_seconds: float
    ratio: float
    bytes_ratio: float
    bandwidth: float
    difference: float


def measure(parts: tuple[str, ...], layers: int) -> Iterator[dict[str, Any]]:
    """What is known after each part, of `PARTS`; `layers` are those of the Llama-8B-shaped model.

    Raises:
        Failure: there is no CUDA GPU.
        RuntimeError: a sparse product is not the dense one.
    """
    if not torch.cuda.is_available():
        raise Failure("`bench gpu` needs a CUDA GPU, and torch finds none here")
    copied = copy_bandwidth()
    found: dict[str, Any] = {"machine": timing.gpu(), "copy_bandwidth": copied}
    bar = progress_bar(len(parts), "bench gpu")
    for part in parts:
        bar.set_postfix_str(part)
        found[part] = PARTS[part](copied, layers)
        bar.update(1)
        yield found
        torch.cuda.empty_cache()
    bar.close()


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.randint(0, 255, (COPIED_BYTES,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    [seconds] = timing.graph_seconds([functools.partial(target.copy_, source)])
    return 2 * source.nbytes / seconds


def _decode(copied: float, layers: int) -> list[dict[str, Any]]:
    points = []
    for shape in DECODE_SHAPES:
        for sparsity in (0.5, 0.6, 0.7):
            dense = _pruned(shape, Unstructured(sparsity))
            weight = _sliced(dense, Bitmask())
            for tokens in (1, 4, 16):
                for way in ("packed",) if tokens < 16 else tuple(WAYS):
                    points.append(_product(way, WAYS[way], dense, weight, sparsity, tokens, copied))
    return points


def _prefill(copied: float, layers: int) -> list[dict[str, Any]]:
    points = []
    for shape in PREFILL_SHAPES:
        dense = _pruned(shape, NM(2, 4))
        for tokens in (1, 16, 512, PREFILL_TOKENS):
            semi = SemiStructuredWeight.of(dense)
            points.append(_product("2:4", lambda x, w: w(x), dense, semi, 0.5, tokens, copied))
        weight = _sliced(dense, NMPacked(2, 4))
        for tokens in (64, 512, PREFILL_TOKENS):
            points.append(_product("decoded", WAYS["decoded"], dense, weight, 0.5, tokens, copied))
    return points


def _pruned(shape: tuple[int, int], pattern: Unstructured | NM) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=DEVICE)
    return (weight * pattern.mask(weight.abs())).bfloat16()


def _sliced(dense: Tensor, fmt: Bitmask | NMPacked) -> Any:
    shape = (dense.shape[0], dense.shape[1])
    return SlicedKernel.of(Stored(fmt, fmt.pack(dense), shape, dense.dtype)).product.weight


def _product(
    what: str,
    way: Callable[[Tensor, Any], Tensor],
    dense: Tensor,
    weight: Any,
    sparsity: float,
    tokens: int,
    copied: float,
) -> dict[str, Any]:
    x = torch.randn(tokens, dense.shape[1], device=DEVICE).bfloat16()
    rows = x[: min(tokens, 64)]
    expected = rows.double() @ dense.double().T
    difference = (way(x, weight)[: len(rows)].double() - expected).norm() / expected.norm()
    if not float(difference) < 1e-2:
        raise RuntimeError(f"{what}, {tuple(dense.shape)}, {tokens} tokens is off by {difference}")
    weights = timing.cold_copies(weight, lambda own: own.copy(), weight.nbytes)
    matrices = timing.cold_copies(dense, torch.clone, dense.nbytes)
    seconds, reference = timing.graph_seconds(
        [functools.partial(way, x, each) for each in weights],
        [functools.partial(F.linear, x, each) for each in matrices],
    )
    return asdict(
        ProductPoint(
            what,
            (dense.shape[0], dense.shape[1]),
            sparsity,
            tokens,
            seconds,
            reference,
            reference / seconds,
            weight.nbytes / dense.nbytes,
            weight.nbytes / seconds / copied,
            float(difference),
        )
    )


def _model(copied: float, layers: int) -> dict[str, Any]:
    """Tokens a second of a Llama-8B-shaped model, dense and sparse, compiled, static cache."""
    found: dict[str, Any] = {"layers": layers}
    config = LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": layers}, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for kind in ("dense", "sparse"):
        if kind == "sparse":
            prune(model, SparseConfig(method="magnitude", sparsity=0.5))
            explanation = explain(model)
            found["kernels"] = str(explanation)
            found["sparse_layers_bytes"] = explanation.bytes_resident / explanation.bytes_dense
        torch.compiler.reset()
        prompt = torch.randint(VOCABULARY, (1, 64), device=DEVICE)
        generate = functools.partial(
            model.generate,
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            cache_implementation="static",
        )
        # The first two compile.
        seconds = [
            _seconds(functools.partial(generate, min_new_tokens=tokens, max_new_tokens=tokens))
            for tokens in 2 * (1, NEW_TOKENS)
        ]
        found[kind] = {
            "tokens_per_second": (NEW_TOKENS - 1) / (seconds[3] - seconds[2]),
            "weight_bytes": weight_bytes(model),
        }
    dense, sparse = found["dense"], found["sparse"]
    found["speed_ratio"] = sparse["tokens_per_second"] / dense["tokens_per_second"]
    found["bytes_ratio"] = sparse["weight_bytes"] / dense["weight_bytes"]
    return found


def _solve(copied: float, layers: int) -> list[dict[str, Any]]:
    """SparseGPT on one layer."""
    rows, columns = SOLVED
    weight = torch.randn(rows, columns, device=DEVICE)
    inputs = torch.randn(4096, columns, device=DEVICE) @ torch.randn(
        columns, columns, device=DEVICE
    )
    hessian = inputs.T @ inputs / len(inputs)
    points = []
    for pattern in (Unstructured(0.5), NM(2, 4)):
        solve = functools.partial(_solved, weight, hessian, pattern)
        change = solve() - weight  # compiles, too
        error = float(((change @ hessian) * change).sum())
        torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(_seconds(solve) for _ in range(ROUNDS))
        peak = torch.cuda.max_memory_allocated()
        points.append(
            {"pattern": str(pattern), "seconds": seconds, "error": error, "peak_bytes": peak}
        )
    return points


def _solved(weight: Tensor, hessian: Tensor, pattern: Unstructured | NM) -> Tensor:
    known = Statistics(1, weight[:1], hessian=hessian)  # new ones: they keep their factorisation
    return SparseGPT().solve(weight, known, pattern).weight


def _prune(copied: float, layers: int) -> dict[str, Any]:
    """Pruning a few blocks shaped like Llama-7B's, and what 32 would take."""
    config = LlamaConfig(**LLAMA_7B, num_hidden_layers=FEW_BLOCKS, max_position_embeddings=4096)
    samples, length = CALIBRATION
    data = [torch.randint(VOCABULARY, (1, length)) for _ in range(samples)]
    recipe = SparseConfig(sparsity=0.5, dataset=data, num_samples=samples, seq_len=length)
    seconds: list[float] = []
    for _ in range(2):  # the first compiles
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        torch.cuda.reset_peak_memory_stats()
        seconds.append(_seconds(functools.partial(prune, model, recipe)))
    return {
        "seconds": seconds[-1],
        "minutes_of_32_blocks": seconds[-1] * 32 / FEW_BLOCKS / 60,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def _seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


PARTS: dict[str, Callable[[float, int], Any]] = {
    "decode": _decode,
    "prefill": _prefill,
    "solve": _solve,
    "model": _model,
    "prune": _prune,
}
