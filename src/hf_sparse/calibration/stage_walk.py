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
from .owners import Owners
from .residual_stream import residual_writers

Weights = Callable[[], AbstractContextManager[None]]


def walk_stages(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    config: SparseConfig,
    dense_weights: Weights,
    activations: Activations | None = None,
    owners: Owners | None = None,
) -> Generator[tuple[Block, Iterator[dict[str, Observed]]]]:
    """Each block that the model reaches, with the statistics of its layers by name, stage by stage.

    A stage's layers are to be solved before the next stage is asked for, and all before the next
    block: statistics are those of what has been left of the layers before. Behind the last stage
    the passes have gone through the block, and its dense weights can go. Take each layer's
    statistics out when it is solved, for they may be large. Close it at the end
    (`contextlib.closing`), also after an exception.

    Args:
        model: in eval mode.
        blocks: from `find_blocks`.
        batches: calibration data.
        config: what the statistics are for.
        dense_weights: a context in which the block's layers have their dense weights.
        activations: see `BlockWalk`.
        owners: of processes that each call this with batches of their own; None for one.

    Raises:
        ProcessError: other processes' batches reach another block.
        CalibrationError: see `BlockWalk`.
        SolveError: a layer saw NaN or infinite inputs; names the layer.
    """
    follows_dense = config.target == "dense"
    walk = BlockWalk(model, blocks, batches, follows_dense, activations)
    with closing(iter(walk)) as visits:
        for visit in visits:
            if owners:
                owners.check_together(visit.block.name)
            block, stages = visit.block, _stages(model, visit, config, dense_weights, owners)
            del visit  # its inputs must not wait for the next block's
            yield block, stages
            del stages
        if owners:
            owners.check_together("")


def _stages(
    model: nn.Module,
    visit: Visit,
    config: SparseConfig,
    dense_weights: Weights,
    owners: Owners | None,
) -> Iterator[dict[str, Observed]]:
    modules = {name: model.get_submodule(name) for name in visit.block.targets}
    stages, factors = [list(modules)], {}
    follows_dense = config.target == "dense"
    from_first = (owners or Owners()).processes.from_first  # a pass tells, and theirs may differ
    if config.stages:
        stages = from_first(lambda: find_stages(visit, modules))
    if follows_dense:
        factors = from_first(lambda: residual_writers(visit, modules))
    writers = {name: modules[name] for name in factors}
    for stage in stages:
        dense = None
        if follows_dense:
            dense = DensePath(dense_weights, stage is stages[-1], writers, factors)
        watched = {name: modules[name] for name in stage}
        yield observe(
            visit,
            watched,
            config.needs,
            dense,
            config.moe_min_tokens,
            config.calibrate_all_experts,
            owners,
        )
    leave = visit.leave
    del visit  # each pass frees its inputs as it goes on
    leave()
