"""What a run from disk to disk will take, from a model's config and shapes alone.

With T calibration tokens, a layer of `out` x `in`, and n = `in`:

    forward passes     2 out n T for each pass; one for the statistics (one a stage with `stages`)
                       and one through the pruned block
    Hessian            n^2 T, once for layers that read the same input
    its factor         n^3 in fp64, once for those
    solving            out n^2, and work that grows with the number of weights
    the rest           time to begin and end, and for each call of a block with a batch
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isqrt, prod
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers import PreTrainedModel

from ...calibration.expected import ExpectedData
from ...checkpoint.config_numbers import bounded_modules
from ...config.sparse_config import SparseConfig
from ...core.duration import duration
from ...core.errors import ConfigError
from ...core.statistics import Needs
from ...layers.blocks import Block, find_blocks
from ...layers.default_dense import default_dense
from ...layers.experts import unfused_experts
from ...layers.select import select_targets
from ...pruning.plan import LayerPlan, plan_layers
from .block_parts import groups, idle, packed_bytes, share
from .rates import Rates, measure_rates
from .residence import LARGE
from .skeleton import open_checkpoint

# Bytes for each weight of the layer at work, in fp32 and the like, when it is being solved.
SOLVING = {Needs.NOTHING: 22, Needs.COLUMN_NORMS: 22, Needs.HESSIAN: 18}
# Bytes for each element of a Hessian while it is being factorised, beside its own 4.
FACTORISING = 8


@dataclass(frozen=True)
class Estimate:
    """Of one run.

    Attributes:
        blocks: how many there are.
        layers: that are pruned.
        weights: that are pruned.
        tokens: of calibration.
        calls: of blocks, each with a batch.
        operations: floating-point operations, by part.
        bytes_read: blocks of the checkpoint, three times over with data, to check them, for one
            pass ahead of the others, and to prune them, and twice without; the rest once, but
            large embeddings for each batch; the finished blocks; and with a checkpoint_dir all of
            it once more, and what is kept, for digests.
        bytes_written: finished blocks, and the result; with a checkpoint_dir what each block made
            of the data, too.
        kept: bytes of these, without the result, that are on the disk at once.
        result: bytes of the result.
        memory: bytes at the peak, by part.
        network_bytes: that a process sends for each block if several share the samples: its part of
            each Hessian, and the solved weights.
        seconds: with the rates; None without.
        rates: of the hardware.
    """

    blocks: int
    layers: int
    weights: int
    tokens: int
    calls: int
    operations: Mapping[str, float]
    bytes_read: int
    bytes_written: int
    kept: int
    result: int
    memory: Mapping[str, int]
    network_bytes: int
    seconds: float | None = None
    rates: Rates | None = None

    @property
    def peak(self) -> int:
        """Bytes of memory."""
        return sum(self.memory.values())

    @property
    def peak_without_activations(self) -> int:
        """The same with activations in a file."""
        return self.peak - self.memory["activations"]

    def timed(self, rates: Rates) -> Estimate:
        """The same with the time that it takes on some hardware."""
        work = self.operations
        seconds = (
            rates.start
            + self.calls * rates.call
            + work["forward"] / rates.forward
            + (work["Hessians"] + work["solving"]) / rates.single
            + work["factors"] / rates.double
            + self.weights / rates.weights
            + (self.bytes_read + self.bytes_written) / rates.disk
        )
        return replace(self, seconds=seconds, rates=rates)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "peak": self.peak}

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in self.memory.items() if v >= 5e6)
        work = ", ".join(f"{k} {v:.2g}" for k, v in self.operations.items() if v)
        lines = [
            f"{self.blocks} blocks, {self.weights / 1e9:.3g} billion weights to prune, "
            f"{self.tokens} calibration tokens",
            f"memory: {self.peak / 1e9:.2f} GB at the peak ({parts})",
            f"disk: {self.bytes_read / 1e9:.1f} GB read, {self.bytes_written / 1e9:.1f} GB written "
            f"({(self.kept + self.result) / 1e9:.1f} GB at once)",
            f"operations: {work or 'none'}",
        ]
        if self.seconds is not None:
            lines.append(f"time: {duration(self.seconds)}")
        return "\n".join(lines)


def estimate(
    model_id_or_path: str | os.PathLike[str],
    config: SparseConfig,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    rates: Rates | None = None,
    measure: bool = True,
    resumable: bool = False,
) -> Estimate:
    """What `prune_checkpoint` will take, from config.json alone: no weights are read.

    Args:
        model_id_or_path: a folder with config.json, or a Hub id.
        config: what is to be done. Data in memory and local files are read and counted, texts if
            there is a tokenizer; data sets of the Hub, and what can be read once, are taken to give
            num_samples of seq_len.
        revision: branch, tag or commit of a Hub id.
        dtype: of the weights, as for `from_pretrained`.
        rates: of the hardware that it is for; None to measure this machine's, for some seconds.
        measure: False to say nothing of time if no rates are given.
        resumable: with a checkpoint_dir, which is more to read and write.

    Raises:
        ConfigError, TargetError: the config doesn't suit the model.
        CalibrationError: data at hand are unusable.
        CheckpointError: there is no such model.
    """
    if not isinstance(config, SparseConfig):
        raise ConfigError(f"estimate needs a SparseConfig, got {type(config).__name__}")
    if rates is not None and not isinstance(rates, Rates):
        raise ConfigError(f"rates must be hf_sparse.Rates or None, got {type(rates).__name__}")
    skeleton = open_checkpoint(model_id_or_path, revision, dtype, weights=False)
    data = ExpectedData.of(skeleton.twin, config)
    found = estimate_model(skeleton.twin, config, data, resumable)
    if rates is None and measure:
        rates = measure_rates(config, skeleton.dtype, isqrt(found.weights // max(1, found.layers)))
    return found if rates is None else found.timed(rates)


def estimate_model(
    model: PreTrainedModel, config: SparseConfig, data: ExpectedData, resumable: bool
) -> Estimate:
    """`estimate` of a model on meta, without the time."""
    with bounded_modules(model.name_or_path), unfused_experts(model):
        selection = select_targets(
            model, config.targets, config.modules_to_not_convert, default_dense(model)
        )
        plans, _ = plan_layers(selection.targets, config, {})
        blocks = find_blocks(model, [plan.target.name for plan in plans], config.blocks)
        by_name = {plan.target.name: plan for plan in plans}
        return _estimate(model, blocks, by_name, config, data, resumable)


def _estimate(
    model: PreTrainedModel,
    blocks: list[Block],
    plans: Mapping[str, LayerPlan],
    config: SparseConfig,
    data: ExpectedData,
    resumable: bool,
) -> Estimate:
    tokens = data.tokens
    itemsize = model.dtype.itemsize
    solves = config.needs is Needs.HESSIAN
    operations = dict.fromkeys(("forward", "Hessians", "factors", "solving"), 0.0)
    worst: dict[str, int] = {}
    written = network = calls = 0
    for block in blocks:
        targets = [plans[name].target for name in block.targets]
        inputs = groups(targets)
        stages = len(inputs) if config.stages else 1
        calls += data.batches * (stages + 1)
        size = sum(p.numel() for p in block.module.parameters())
        active = size - idle(block, model)
        operations["forward"] += 2 * active * tokens * (stages + 1)
        hessians = [4 * n * n for n, _ in inputs] if solves else []
        for n, members in inputs if solves else ():
            operations["Hessians"] += n * n * tokens * share(members, model)
            operations["factors"] += n**3
            operations["solving"] += sum(target.shape[0] for target in members) * n * n
        largest = max(prod(target.shape) for target in targets)
        held = max(hessians, default=0) if config.stages else sum(hessians)
        at_once = max([FACTORISING * h // 4 for h in hessians] + [SOLVING[config.needs] * largest])
        packed = sum(packed_bytes(plans[name], config, itemsize) for name in block.targets)
        parts = {
            "block": size * itemsize,
            "Hessians": held,
            "solving": max(at_once, packed - held),
        }
        worst = max(worst, parts, key=lambda x: sum(x.values()))
        dense = size - sum(prod(target.shape) for target in targets)
        written += packed + dense * itemsize
        network = max(network, held + packed)
    inside = {id(p) for block in blocks for p in block.module.parameters()}
    outside = [p for p in model.parameters() if id(p) not in inside]
    sizes = [p.numel() * itemsize for p in outside]
    # A large one is copied from its file's pages when it is called, and to be written.
    copied = {"reading": 2 * max(sizes, default=0)}
    worst = max(worst, copied, key=lambda x: sum(x.values()))
    small = sum(size for size in sizes if size < LARGE)
    everything = sum(p.numel() for p in model.parameters()) * itemsize
    width = getattr(model.config.get_text_config(), "hidden_size", 0) or 0
    activations = tokens * width * itemsize * (2 if config.target == "dense" else 1)
    kept = (len(blocks) - 1) * activations if resumable else 0
    rest = sum(sizes)
    embedding = max((size for size in sizes if size >= LARGE), default=0)
    again = everything + written + kept if resumable else 0
    return Estimate(
        blocks=len(blocks),
        layers=len(plans),
        weights=sum(prod(plan.target.shape) for plan in plans.values()),
        tokens=tokens,
        calls=calls,
        operations=operations,
        bytes_read=(everything - rest) * (3 if tokens else 2)
        + rest
        + data.batches * embedding
        + written
        + again,
        bytes_written=2 * written + rest + kept,
        kept=written + min(kept, 2 * activations),
        result=written + rest,
        memory={
            "process": psutil.Process().memory_info().rss,
            "outside the blocks": small,
            "activations": activations,
            **worst,
        },
        network_bytes=network,
    )
