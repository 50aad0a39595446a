"""The walk that layers are solved along: block by block, and stage by stage inside a block."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing

from torch import nn

from ..config.sparse_config import SparseConfig
from ..layers.blocks import Block
from .activations import Activations
from .batches import Batch
from .block_walk import BlockWalk, Visit
from .experts import observe
from .feeding_order import find_stages
from .layer_statistics import DensePath, Observed
from .residual_stream import residual_writers

Weights = Callable[[], AbstractContextManager[None]]


def walk_stages(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    config: SparseConfig,
    dense_weights: Weights,
    activations: Activations | None = None,
) -> Generator[tuple[Block, Iterator[tuple[str, Observed]]]]:
    """Each block that the model reaches, with its layers' names and statistics, stage by stage.

    A layer is to be solved before the next one is asked for, and the layers to the end before the
    next block: statistics are those of what has been left of the layers before. Behind the last one
    the passes have gone through the block, and its dense weights can go. Close it at the end
    (`contextlib.closing`), also after an exception.

    Args:
        model: in eval mode.
        blocks: from `find_blocks`.
        batches: calibration data.
        config: what the statistics are for.
        dense_weights: a context in which the block's layers have their dense weights.
        activations: see `BlockWalk`.

    Raises:
        CalibrationError: see `BlockWalk`.
        SolveError: a layer saw NaN or infinite inputs; names the layer.
    """
    follows_dense = config.target == "dense"
    walk = BlockWalk(model, blocks, batches, follows_dense, activations)
    with closing(iter(walk)) as visits:
        for visit in visits:
            block, layers = visit.block, _layers(model, visit, config, dense_weights)
            del visit  # its inputs must not wait for the next block's
            yield block, layers
            del layers


def _layers(
    model: nn.Module, visit: Visit, config: SparseConfig, dense_weights: Weights
) -> Iterator[tuple[str, Observed]]:
    modules = {name: model.get_submodule(name) for name in visit.block.targets}
    stages = find_stages(visit, modules) if config.stages else [list(modules)]
    follows_dense = config.target == "dense"
    factors = residual_writers(visit, modules) if follows_dense else {}
    writers = {name: modules[name] for name in factors}
    for stage in stages:
        dense = None
        if follows_dense:
            dense = DensePath(dense_weights, stage is stages[-1], writers, factors)
        watched = {name: modules[name] for name in stage}
        found = observe(
            visit,
            watched,
            config.needs,
            dense,
            config.moe_min_tokens,
            config.calibrate_all_experts,
        )
        for name in list(found):
            yield name, found.pop(name)
    leave = visit.leave
    del visit  # each pass frees its inputs as it goes on
    leave()
