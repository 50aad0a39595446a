"""What a model's attention is like: where its mass lies, and what each sparse method gets wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..calibration.attention import SAMPLES, some_queries_and_keys
from ..config.arguments import ARGUMENTS
from ..core.attention_settings import METHODS, AttentionSettings
from ..core.data_record import DataRecord
from ..core.errors import EvaluationError
from ..layers.attention.install import watched
from ..layers.attention.interface import parts, sparse
from ..layers.attention.masks import LazyMask
from .data import evaluating, load_data, to_device


@dataclass(frozen=True)
class HeadDiagnosis:
    """One query head of one layer.

    Attributes:
        layer: name of the attention layer.
        head: its number.
        top: share of a query's attention that its heaviest `keys` keys hold, mean over queries.
        window: share that the `keys` keys before it hold.
        low_rank: share of the squared attention of `queries` queries that its best approximation of
            rank `rank` holds.
        errors: relative error of the head's output by method, ||o - o'|| / ||o||.
    """

    layer: str
    head: int
    top: float
    window: float
    low_rank: float
    errors: Mapping[str, float]


@dataclass(frozen=True)
class AttentionDiagnosis:
    """What `diagnose_attention` found; `print` it.

    Attributes:
        heads: of every attention layer.
        keys, block: that the methods had.
        queries, rank: that `low_rank` is about.
        seq_len: tokens of a sample.
        data: where they came from, with their digest.
    """

    heads: tuple[HeadDiagnosis, ...]
    keys: int
    block: int
    queries: int
    rank: int
    seq_len: int
    data: DataRecord

    @property
    def layers(self) -> Mapping[str, Mapping[str, float]]:
        """Means over each layer's heads, by layer and column."""
        grouped: dict[str, list[HeadDiagnosis]] = {}
        for head in self.heads:
            grouped.setdefault(head.layer, []).append(head)
        return {
            layer: {name: fmean(_row(h)[name] for h in heads) for name in _row(heads[0])}
            for layer, heads in grouped.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """A line for each layer, and their mean."""
        rows = dict(self.layers)
        columns = list(next(iter(rows.values())))
        rows["mean"] = {name: fmean(row[name] for row in rows.values()) for name in columns}
        width = max(map(len, rows))
        lines = [f"{'layer':<{width}}  " + "  ".join(f"{name:>9}" for name in columns)]
        for layer, row in rows.items():
            cells = "  ".join(f"{row[name]:{max(9, len(name))}.3f}" for name in columns)
            lines.append(f"{layer:<{width}}  {cells}")
        return "\n".join(
            [
                f"attention at {self.seq_len} tokens of {self.data.source}: shares of the mass in "
                f"{self.keys} keys and in rank {self.rank}, then each method's relative error",
                *lines,
            ]
        )


def _row(head: HeadDiagnosis) -> dict[str, float]:
    shares = {"top keys": head.top, "window": head.window, "low rank": head.low_rank}
    return shares | dict(head.errors)


def diagnose_attention(
    model: nn.Module,
    tokenizer: Any,
    dataset: Any,
    seq_len: int | None = None,
    *,
    attention: Mapping[str, Any] | AttentionSettings | None = None,
    methods: Sequence[str] = tuple(METHODS),
    num_samples: int = 1,
    queries: int = 64,
    rank: int = 16,
    seed: int = 0,
    split: str = "test",
) -> AttentionDiagnosis:
    """Find out which sparse attention suits a model, head by head, on texts.

    The model computes with exact attention throughout; afterwards its attention is what it was.
    What some methods learn, they learn of the same texts.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; None if the data are token ids.
        dataset: as of `perplexity`.
        seq_len: tokens of a sample. Default min(2048, what the model allows).
        attention: settings of the methods, but for their names; a fourth of `seq_len` keys unless
            it says so.
        methods: whose errors are measured.
        num_samples: samples at most.
        queries: queries of a sample, evenly spread over its second half, of which shares are taken.
        rank: of `low_rank`.
        seed: order in which documents are drawn.
        split: as of `perplexity`.

    Raises:
        EvaluationError: a number is out of range, or the model is no causal language model.
        ConfigError: there is no such method or setting, or the model's attention can't be replaced.
        CalibrationError: the data are unusable.
    """
    if not 1 <= rank <= queries:
        raise EvaluationError(f"rank={rank} must be at least 1 and at most queries={queries}")
    loaded, seq_len = load_data(model, lambda: tokenizer, dataset, seq_len=seq_len,
        num_samples=num_samples, batch_size=1, seed=seed, split=split)  # fmt: skip
    given: Any = {"keys": max(1, seq_len // 4)} if attention is None else attention
    settings = ARGUMENTS["attention"].check("attention", given)
    candidates = {
        method: replace(settings, method=method, selector="", residual="", from_length=0)
        for method in methods
    }
    found: dict[str, list[dict[str, Tensor]]] = {}
    names = {module: name for name, module in model.named_modules()}

    def observe(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float
    ) -> None:
        if isinstance(mask, Tensor):
            raise EvaluationError(f"{type(model).__name__} makes its masks itself")
        whole = LazyMask.plain(q, k, causal=True) if mask is None else mask
        exact, _ = sdpa_attention_forward(
            module, q, k, v, whole.dense, scaling=scaling, is_causal=whole.causal
        )
        row = _shares(q, k, whole, scaling, settings.keys, queries, rank)
        for method, each in candidates.items():
            row[method] = _errors(exact, q, k, v, whole, scaling, each)
        found.setdefault(names[module], []).append(row)

    inner: Any = model
    with evaluating(model), watched(inner, observe):
        for batch in loaded.batches:
            inner(**to_device(batch, model), use_cache=False)
    if not found:
        raise EvaluationError(f"{type(model).__name__} doesn't call transformers' attention")
    heads = [
        _head(layer, index, rows, list(candidates))
        for layer, rows in found.items()
        for index in range(len(rows[0]["top"]))
    ]
    return AttentionDiagnosis(
        tuple(heads), settings.keys, settings.block, queries, rank, seq_len, loaded.record
    )


def _shares(
    q: Tensor, k: Tensor, mask: LazyMask, scaling: float, keys: int, queries: int, rank: int
) -> dict[str, Tensor]:
    """What of the attention of some queries the top keys, a window and a low rank hold; (heads,)
    each."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    places = torch.linspace(length // 2, length - 1, queries, device=q.device).long()
    key = torch.arange(k.shape[2], device=k.device)
    scores = q[0, :, places].float() @ k[0].float().repeat_interleave(groups, 0).mT * scaling
    allowed = mask.allowed(torch.zeros_like(key[:1]), places[:, None], key) & mask.valid[:1]
    weights = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)
    near = (key <= places[:, None]) & (key > places[:, None] - keys)
    energy = torch.linalg.svdvals(weights).square()
    return {
        "top": weights.topk(min(keys, len(key)), dim=-1).values.sum(dim=-1).mean(dim=-1),
        "window": (weights * near).sum(dim=-1).mean(dim=-1),
        "low_rank": energy[:, :rank].sum(dim=-1) / energy.sum(dim=-1),
    }


def _errors(
    exact: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: LazyMask, scaling: float,
    settings: AttentionSettings,
) -> Tensor:  # fmt: skip
    """Relative error of each head's output; (heads,)."""
    selector, _ = parts(settings)
    learned = {}
    if selector.learns:
        generator = torch.Generator().manual_seed(settings.seed)
        sample = some_queries_and_keys(q[:1] * scaling, k[:1], SAMPLES, generator)
        learned = selector.learn(*sample, settings)
    found = sparse(q, k, v, mask, scaling, settings, learned)
    size = exact.float().square().sum(dim=(0, 1, 3))
    return ((found - exact).float().square().sum(dim=(0, 1, 3)) / size).sqrt()


def _head(
    layer: str, index: int, rows: Sequence[Mapping[str, Tensor]], methods: Sequence[str]
) -> HeadDiagnosis:
    """One head's means over the samples."""
    mean = {name: fmean(float(row[name][index]) for row in rows) for name in rows[0]}
    errors = {method: mean[method] for method in methods}
    return HeadDiagnosis(layer, index, mean["top"], mean["window"], mean["low_rank"], errors)
