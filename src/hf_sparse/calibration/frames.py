"""Which frames of sound are padding: the rows of layers behind convolutions that shorten the input.

The mask of such a model's data has an entry for each sample of sound, its layers get a row for each
frame. transformers' models make the one mask of the other in `_get_feature_vector_attention_mask`;
they are asked, with the arguments that they call it with themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from .batches import Batch
from .padding import count_rows, count_rows_without, is_padded, shape_of

MASK = "attention_mask"
METHOD = "_get_feature_vector_attention_mask"

# The number of frames of each item, and a mask (items, samples of sound), to one (items, frames).
FrameMask: TypeAlias = Callable[[int, Tensor], Tensor]


def frame_masks(
    model: nn.Module,
    run: Callable[[Batch], object],
    batches: Sequence[Batch],
    modules: Collection[nn.Module],
) -> dict[nn.Module, FrameMask]:
    """For each module whose rows are frames, what makes their mask.

    Those are frames' rows that are as many as the model has frames, for a batch and for the same
    batch cut short.

    Args:
        model: it, or a model inside it, makes frames' masks; else there are none.
        run: one forward pass over a batch; without padding none is made.
        batches: one for each set of inputs is tried.
        modules: layers, or modules whose first input is (rows, channels).
    """
    found: dict[nn.Module, FrameMask] = {}
    if not any(hasattr(module, METHOD) for module in model.modules()):
        return found
    for batch in {frozenset(b): b for b in batches if is_padded(b.get(MASK))}.values():
        items, samples = shape_of(batch, MASK)
        with _asked_for(model) as asked:
            rows = count_rows(run, batch, modules)
        with _asked_for(model) as asked_shorter:
            fewer = count_rows_without(run, batch, MASK, samples // 4, modules)
        if fewer is None:
            fewer, asked_shorter = rows, asked
        pairs = list(zip(asked, asked_shorter, strict=False))
        for module in modules:
            counts = list(zip(rows[module], fewer[module], strict=False))
            for (frames, make), (less, _) in pairs:
                if (items * frames, items * less) in counts:
                    found.setdefault(module, make)
    return found


@contextmanager
def _asked_for(model: nn.Module) -> Iterator[list[tuple[int, FrameMask]]]:
    """While this lasts: how many frames the model asks masks for, and how it does."""
    asked: list[tuple[int, FrameMask]] = []
    makers = [module for module in model.modules() if hasattr(module, METHOD)]

    def ask(original: Any, frames: int, mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        make = partial(_made, original, args, kwargs)
        asked.append((int(frames), make))
        made: Tensor = original(frames, mask, *args, **kwargs)
        return made

    for module in makers:
        setattr(module, METHOD, partial(ask, getattr(module, METHOD)))
    try:
        yield asked
    finally:
        for module in makers:
            delattr(module, METHOD)


def _made(
    original: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], frames: int, mask: Tensor
) -> Tensor:
    made: Tensor = original(frames, mask.long(), *args, **kwargs)
    return made.bool()
