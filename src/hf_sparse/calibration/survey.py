"""What passes through a model show before any of them stops: which blocks are called, how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import nn

from ..layers import SparseExperts
from ..layers.blocks import Block
from .batches import Batch
from .forward import call_model
from .hooks import hooked
from .padded_rows import find_told
from .padding import Told


@dataclass(frozen=True)
class Survey:
    """Of a model on some batches.

    Attributes:
        blocks: with the layers of a block that the model doesn't call as a module, but by its
            `forward`, in the block's place.
        repeated: the blocks' modules that one pass calls more than once.
        told: by what it is told which rows of each layer are padding.
    """

    blocks: tuple[Block, ...]
    repeated: AbstractSet[nn.Module]
    told: Told

    @classmethod
    def of(cls, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch]) -> Survey:
        """Run the model once for each set of inputs that batches have, and for padding again."""
        layers = {name: model.get_submodule(name) for block in blocks for name in block.targets}
        most: Counter[nn.Module] = Counter()
        counts: Counter[nn.Module] = Counter()
        watched = {block.module for block in blocks} | set(layers.values())
        with hooked(
            module.register_forward_pre_hook(lambda m, _: counts.update([m])) for module in watched
        ):
            for batch in {frozenset(batch): batch for batch in batches}.values():
                call_model(model, batch)
                most |= counts
                counts.clear()
        experts = [m for m in model.modules() if isinstance(m, SparseExperts)]
        told = find_told(model, blocks, batches, layers, experts)
        called = tuple(part for block in blocks for part in _callable(block, layers, most))
        return cls(called, {b.module for b in called if most[b.module] > 1}, told)


def _callable(
    block: Block, layers: Mapping[str, nn.Module], called: Counter[nn.Module]
) -> Iterator[Block]:
    """The block, or its layers if only they are called."""
    parts = [Block(name, layers[name], (name,)) for name in block.targets]
    if called[block.module] or not any(called[part.module] for part in parts):
        yield block
    else:
        yield from parts
