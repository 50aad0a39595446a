"""The masks that a model hands to its blocks, whatever it made them of.

Patches of an image that is padded, text and patches in a row, frames behind several convolutions:
what becomes of the data's mask is the model's own business, but what its attention must not see is
in the arguments of its blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .hooks import hooked
from .token_masks import token_mask

ENDS = ("attention_mask", "patch_mask")


def masks_in_call(
    block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Tensor]:
    """(samples, tokens), true where there is a token, of each mask in a block's arguments."""
    try:
        given = inspect.signature(block.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:
        return
    named = {**given, **given.get("kwargs", {})}
    for name, value in named.items():
        if name.endswith(ENDS) and isinstance(value, Tensor):
            mask = token_mask(value)
            if mask is not None:
                yield mask


def told_by_blocks(
    count_rows: Callable[[], Mapping[nn.Module, Sequence[int]]],
    blocks: Collection[nn.Module],
    modules: Collection[nn.Module],
) -> set[nn.Module]:
    """The modules whose rows are as many as a mask has tokens that their block is handed.

    Args:
        count_rows: one pass over a batch: how many rows each module gets at each of its calls.
        blocks: of the model.
        modules: those that are asked for.
    """
    handed: dict[nn.Module, set[int]] = {}

    def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handed[block] = {mask.numel() for mask in masks_in_call(block, args, kwargs)}

    with hooked(b.register_forward_pre_hook(look, with_kwargs=True) for b in blocks):
        rows = count_rows()
    return {
        module
        for block, tokens in handed.items()
        for module in block.modules()
        if module in modules and rows[module] and tokens.issuperset(rows[module])
    }
