"""Products of single layers, sparse against dense, from cold weights.

The candidates take turns, one call each, so that whatever else the machine does hits them alike; a
figure is the median over the rounds. Each walks through copies of its weight that are together
larger than the caches, so that every call reads its weight from memory, as a model's layers do.
The dense candidates multiply the same pruned weight, and the products are compared first.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sparse.core.logging import get_logger, progress_bar
from hf_sparse.core.patterns import parse_pattern
from hf_sparse.formats.bitmask import Bitmask
from hf_sparse.kernels.cpu import library
from hf_sparse.kernels.cpu.integer.weight import IntegerWeight
from hf_sparse.kernels.cpu.integer.weight import pack as pack_integers
from hf_sparse.kernels.cpu.pack import narrow, pack_dense, unpack
from hf_sparse.kernels.cpu.product import packed_linear
from hf_sparse.kernels.cpu.weight import TileWeight

from .threads import torch_threads

logger = get_logger(__name__)

_NAMES = ("fp32", "bf16", "fp16", "int8", "int4")
_TYPES = (*library.FLOATS, *library.INTEGERS)
VALUES = dict(zip(_NAMES, _TYPES, strict=True))
INT8 = "torch.ao dynamic int8"
EXACT = "sparse, x as it is"  # where x is rounded otherwise
# Candidate -> the sparse one it is compared with: the one that takes the same x.
RIVALS = {
    "torch fp32": "sparse, fp32 x",
    "torch bf16": "sparse, bf16 x",
    INT8: "sparse, fp32 x",
    EXACT: "sparse, fp32 x",
}
TOLERANCE = 1e-3  # of max |y|: both sum in fp32, in another order
ROUNDED = 3e-2  # the same where x is rounded to int8

Call = Callable[[int], Tensor]


@dataclass(frozen=True)
class LayerSettings:
    """Points to measure (shapes are (out, in), rows are M), and how.

    Attributes:
        group_size: columns that share a scale of int8 and int4 values; None for a scale per output.
        pattern: "unstructured", or "n:m" in place of the sparsities.
        activations: "int8" if x is rounded to that, for int8 and int4 values; else None.
        path: instruction set of the sparse kernels; None for what they choose themselves.
        cold_bytes: the copies of each candidate take at least as much together.
        rounds: calls of each candidate at a point, at least.
        seconds: how long to go on with a point, all candidates together.
    """

    shapes: tuple[tuple[int, int], ...]
    sparsities: tuple[float, ...]
    rows: tuple[int, ...]
    threads: tuple[int, ...]
    values: tuple[str, ...]
    group_size: int | None
    pattern: str
    activations: str | None
    path: str | None
    cold_bytes: int
    rounds: int
    seconds: float


@dataclass(frozen=True)
class LayerPoint:
    """One measured point.

    Attributes:
        path: instruction set that was asked for, or "best".
        seconds: median of a call, by candidate.
        ratios: how many times as fast the sparse product is, by dense candidate.
        rounds: calls behind each median.
        difference: largest one to the dense fp32 product, over that one's largest element.
        sparse_bytes, dense_bytes: of the resident weight, and of a dense bf16 one.
    """

    path: str
    shape: tuple[int, int]
    sparsity: float
    values: str
    threads: int
    rows: int
    seconds: dict[str, float]
    ratios: dict[str, float]
    rounds: int
    difference: float
    sparse_bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class _Weights:
    """Copies of one pruned weight, as each candidate holds it; `rounded` if x is rounded."""

    sparse: list[TileWeight]
    rounded: list[IntegerWeight]
    fp32: list[Tensor]
    bf16: list[Tensor]
    int8: list[nn.Module]


def measure(settings: LayerSettings) -> list[LayerPoint]:
    """All points: for each weight, for each number of threads, for each M.

    Raises:
        NativeUnavailableError: there are no sparse kernels to measure.
        RuntimeError: a sparse product is not the dense one.
    """
    library.library()
    points: list[LayerPoint] = []
    each = list(product(settings.shapes, settings.sparsities, settings.values))
    bar = progress_bar(len(each) * len(settings.threads) * len(settings.rows), "layers")
    try:
        for shape, sparsity, values in each:
            weights = _make(settings, shape, sparsity, VALUES[values])
            own = weights.rounded[0] if weights.rounded else weights.sparse[0]
            size = own.nbytes, 2 * shape[0] * shape[1]
            for threads, rows in product(settings.threads, settings.rows):
                kind = f"{values} {settings.pattern}".removesuffix(" unstructured")
                place = (settings.path or "best", shape, sparsity, kind, threads, rows)
                try:
                    with torch_threads(threads):
                        found = _measure(settings, weights, rows)
                    points.append(LayerPoint(*place, *found, *size))
                except library.NativeError as error:  # AMX, say, takes no single row
                    logger.warning("left out %s: %s", place, error)
                bar.update(1)
            del weights  # before the next are made
    finally:
        bar.close()
    return points


def _measure(
    settings: LayerSettings, weights: _Weights, rows: int
) -> tuple[dict[str, float], dict[str, float], int, float]:
    """Seconds, ratios, rounds and difference of a point."""
    candidates = _candidates(weights, rows, settings.path)
    difference = _difference(candidates, ROUNDED if settings.activations else TOLERANCE)
    seconds, rounds = _interleave(candidates, settings.rounds, settings.seconds)
    ratios = {d: seconds[d] / seconds[s] for d, s in RIVALS.items() if d in seconds}
    return seconds, ratios, rounds, difference


def _make(
    settings: LayerSettings, shape: tuple[int, int], sparsity: float, dtype: torch.dtype
) -> _Weights:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight *= parse_pattern(settings.pattern, sparsity).mask(weight.abs())
    rounded: list[IntegerWeight] = []
    if dtype in library.INTEGERS:
        packed = _quantised(weight, dtype, settings.group_size or shape[1])
    else:
        packed = pack_dense(weight.to(dtype))
    dense = packed.decode(torch.float32)
    if settings.activations and packed.scales is not None:
        rounded.append(_integers(packed))
    engine = torch.backends.quantized.engine  # of dynamic int8; not every build of torch has one

    def copies(nbytes: int) -> range:
        return range(max(2, -(-settings.cold_bytes // nbytes)))

    return _Weights(
        [copy.deepcopy(packed) for _ in copies(packed.nbytes)],
        [copy.deepcopy(each) for each in rounded for _ in copies(each.nbytes)],
        [dense.clone() for _ in copies(4 * dense.numel())],
        [dense.to(torch.bfloat16, copy=True) for _ in copies(2 * dense.numel())],
        [_dynamic_int8(dense) for _ in copies(dense.numel()) if engine != "none"],
    )


def _quantised(weight: Tensor, dtype: torch.dtype, group_size: int) -> TileWeight:
    """The weight with symmetric codes of 8 or 4 bits, rounded to the nearest."""
    top = 127 if dtype == torch.int8 else 7
    groups = torch.split(weight, group_size, dim=1)
    scales = torch.stack([group.abs().amax(1).clamp_min(1e-9) / top for group in groups], dim=1)
    codes = [(g / s[:, None]).round() for g, s in zip(groups, scales.unbind(1), strict=True)]
    packed = pack_dense(torch.cat(codes, dim=1).to(torch.int8), scales, group_size)
    return packed if dtype == torch.int8 else narrow(packed)


def _integers(packed: TileWeight) -> IntegerWeight:
    """The same codes and scales in the integer layout; scales are bf16 there."""
    assert packed.scales is not None
    bitmask, values = unpack(packed)
    stored = {"weight": values, "weight_bitmask": bitmask}
    codes = Bitmask().unpack(stored, packed.shape, torch.int8)
    scales = packed.scales.transpose(1, 2).flatten(0, 1)[: packed.shape[0]]
    return pack_integers(codes, scales, packed.group_size)


def _dynamic_int8(dense: Tensor) -> nn.Module:
    """The layer that torch.ao's dynamic quantisation makes of a weight."""
    linear = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(dense, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what torch itself offers for CPUs
        quantised = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8
        )
    layer: nn.Module = quantised[0]
    return layer


def _candidates(weights: _Weights, rows: int, path: str | None) -> dict[str, Call]:
    """By name what makes the i-th call; the calls bypass `nn.Module.__call__`, as F.linear does."""
    x = torch.randn(rows, weights.fp32[0].shape[1])
    half = x.bfloat16()
    sparse, fp32, bf16, int8 = weights.sparse, weights.fp32, weights.bf16, weights.int8
    # The two sparse candidates share their copies and stay half of them apart.
    other = sparse[len(sparse) // 2 :] + sparse[: len(sparse) // 2]
    candidates: dict[str, Call] = {
        "torch fp32": lambda i: F.linear(x, fp32[i % len(fp32)]),
        "sparse, fp32 x": lambda i: packed_linear(x, sparse[i % len(sparse)], path=path),
        "torch bf16": lambda i: F.linear(half, bf16[i % len(bf16)]),
        "sparse, bf16 x": lambda i: packed_linear(half, other[i % len(other)], path=path),
        INT8: lambda i: int8[i % len(int8)].forward(x),
    }
    if rounded := weights.rounded:
        behind = rounded[len(rounded) // 2 :] + rounded[: len(rounded) // 2]
        candidates |= {
            EXACT: candidates["sparse, fp32 x"],
            "sparse, fp32 x": lambda i: packed_linear(x, rounded[i % len(rounded)], path=path),
            "sparse, bf16 x": lambda i: packed_linear(half, behind[i % len(rounded)], path=path),
        }
    return candidates if int8 else {k: v for k, v in candidates.items() if k != INT8}


def _difference(candidates: dict[str, Call], tolerance: float) -> float:
    """Largest difference of the fp32 products, over the largest element of the dense one."""
    expected, found = candidates["torch fp32"](0), candidates["sparse, fp32 x"](0)
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= tolerance:
        raise RuntimeError(f"the sparse product is off by {difference:.2g} of max |y|")
    return difference


def _interleave(
    candidates: dict[str, Call], rounds: int, seconds: float
) -> tuple[dict[str, float], int]:
    """Median seconds of a call of each candidate, and the number of rounds."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call(0)
    started, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - started < seconds:
        done += 1
        for name, call in candidates.items():
            begin = time.perf_counter()
            call(done)
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}, done
