"""Where a model's blocks are while a run isn't at work on them: in memory, as it is here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..calibration.activations import Activations
from ..config.sparse_config import SparseConfig
from ..core.data_record import DataRecord
from ..layers.blocks import Block
from .report import LayerReport


@dataclass(frozen=True)
class FinishedBlock:
    """What a run is to know of a block that it has finished.

    Attributes:
        layers: reports of its layers that are packed, in the order of solving.
        seconds: what it took.
    """

    layers: tuple[LayerReport, ...]
    seconds: float


class Residence:
    """All in memory: a block is there before it is pruned, and stays when it is.

    Attributes:
        finished: the blocks that a run before has finished, by name, in its order.
        activations: where passes wait between two blocks.
    """

    finished: Mapping[str, FinishedBlock] = {}
    activations: Activations | None = None

    def begin(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        config: SparseConfig,
        record: DataRecord | None,
    ) -> None:
        """Called once it is known what is to be pruned, and with which data; nothing is done yet.

        Raises:
            HfSparseError: the run can't be made.
        """

    @contextmanager
    def at_work(self, block: Block) -> Iterator[None]:
        """While this lasts a block's weights are in memory."""
        yield

    def finish(self, block: Block, done: FinishedBlock) -> None:
        """A block is pruned and packed: called within `at_work`."""
