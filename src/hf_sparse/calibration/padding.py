"""Which rows of a layer's input are padding.

A batch has masks (samples, tokens) beside its inputs; a layer gets rows. Those of a decoder, or the
patches of an image, may be as many as the tokens of a mask that isn't theirs. So it is tried: the
inputs that a mask goes with lose their last token, and the layers that then get a row less for each
sample have that mask's tokens. Layers whose rows are frames of sound are told by `frames`, and
those that neither tells by the mask that the model hands to their block (`block_masks`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CalibrationError
from ..layers.axes import Axes
from .batches import Batch
from .block_masks import masks_in_call
from .hooks import hooked
from .token_masks import token_mask

# Each mask, and how the names of the inputs begin that it goes with.
MASKS = {"attention_mask": "", "decoder_attention_mask": "decoder_"}


@dataclass(frozen=True)
class Told:
    """By what it is told which rows of a module are padding.

    Attributes:
        owners: the modules whose rows are a mask's tokens.
        frames: for modules whose rows are frames, what makes their mask of `attention_mask`: a
            function of the frames of each sample and that mask.
        blocks: the modules whose rows are the tokens of a mask that their block is handed.
    """

    owners: Mapping[str, AbstractSet[nn.Module]] = field(default_factory=dict)
    frames: Mapping[nn.Module, Callable[[int, Tensor], Tensor]] = field(default_factory=dict)
    blocks: AbstractSet[nn.Module] = frozenset()


@dataclass(frozen=True)
class Padding:
    """What is padding in one batch.

    Attributes:
        masks: (samples, tokens), true where there is a token; those that say so everywhere are
            left out.
        told: by what it is told for each module.
        handed: the masks that the block is handed, likewise.
    """

    masks: Mapping[str, Tensor] = field(default_factory=dict)
    told: Told = Told()
    handed: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, batch: Batch, told: Told) -> Padding:
        masks = {name: token_mask(batch[name]) for name in MASKS if is_padded(batch.get(name))}
        return cls({name: mask for name, mask in masks.items() if mask is not None}, told)

    def in_call(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Padding:
        """With the masks that a block is handed, if any of its layers goes by these."""
        if self.told.blocks.isdisjoint(block.modules()):
            return self
        return replace(self, handed=tuple(masks_in_call(block, args, kwargs)))

    def tokens(self, module: nn.Module, rows: int) -> Tensor | None:
        """Which of a module's rows are no padding, shape (rows,); None if all are."""
        for name, mask in self.masks.items():
            if module in self.told.owners[name] and mask.numel() == rows:
                return mask.flatten()
        sound = self.masks.get("attention_mask")
        if module in self.told.frames and sound is not None and rows % len(sound) == 0:
            return self.told.frames[module](rows // len(sound), sound).flatten()
        if module in self.told.blocks:
            fitting = [mask.flatten() for mask in self.handed if mask.numel() == rows]
            if fitting and all(torch.equal(mask, fitting[0]) for mask in fitting):
                return fitting[0]
        return None


def mask_owners(
    run: Callable[[Batch], object], batches: Sequence[Batch], modules: Collection[nn.Module]
) -> dict[str, set[nn.Module]]:
    """The modules whose rows are the tokens of each mask.

    Where the model can't run without a batch's last token, those with as many rows as tokens.

    Args:
        run: one forward pass over a batch; without padding none is made.
        batches: one for each set of inputs is tried.
        modules: layers, or modules whose first input is (rows, channels).
    """
    owners: dict[str, set[nn.Module]] = {}
    for name in MASKS:
        padded = {frozenset(b): b for b in batches if is_padded(b.get(name))}
        found = [_owners(run, batch, name, modules) for batch in padded.values()]
        owners[name] = set().union(*found)
    return owners


def _owners(
    run: Callable[[Batch], object], batch: Batch, name: str, modules: Collection[nn.Module]
) -> set[nn.Module]:
    samples, tokens = shape_of(batch, name)
    rows = count_rows(run, batch, modules)
    fewer = count_rows_without(run, batch, name, 1, modules) if tokens > 1 else None
    cut = 0 if fewer is None else samples
    expected = samples * tokens, samples * tokens - cut
    fewer = fewer or rows
    return {module for module in rows if expected in zip(rows[module], fewer[module], strict=False)}


def shape_of(batch: Batch, name: str) -> tuple[int, int]:
    """(samples, tokens) of a mask that tells its tokens."""
    mask = token_mask(batch[name])
    assert mask is not None
    samples, tokens = mask.shape
    return samples, tokens


def count_rows_without(
    run: Callable[[Batch], object],
    batch: Batch,
    name: str,
    tokens: int,
    modules: Iterable[nn.Module],
) -> dict[nn.Module, list[int]] | None:
    """As `count_rows`, without the last tokens of the inputs that a mask goes with; None if the
    model can't run on that."""
    try:
        return count_rows(run, _without_last(batch, name, tokens), modules)
    except CalibrationError:
        return None


def _without_last(batch: Batch, name: str, tokens: int) -> Batch:
    others = tuple(prefix for prefix in MASKS.values() if prefix > MASKS[name])
    shape, cut = shape_of(batch, name), {}
    for key, value in batch.items():
        own = key.startswith(MASKS[name]) and not key.startswith(others)
        if key == name and value.ndim > 2:  # each token's, of each
            value = value[..., : -tokens or None]
            queries = value.shape[-2] if value.shape[-2] == 1 else value.shape[-2] - tokens
            cut[key] = value[..., :queries, :]
        else:
            aligned = own and tuple(value.shape[:2]) == shape
            cut[key] = value[:, : value.shape[1] - tokens] if aligned else value
    return cut


def count_rows(
    run: Callable[[Batch], object], batch: Batch, modules: Iterable[nn.Module]
) -> dict[nn.Module, list[int]]:
    """How many rows each module gets at each of its calls in a pass."""
    counts: dict[nn.Module, list[int]] = {module: [] for module in modules}

    def count(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        counts[module].append(Axes.of(module).channels_last(x).shape[:-1].numel())

    with hooked(m.register_forward_pre_hook(count, with_kwargs=True) for m in counts):
        run(batch)
    return counts


def is_padded(mask: Tensor | None) -> bool:
    """Does a mask tell its tokens, and mark any padding?"""
    tokens = token_mask(mask)
    return tokens is not None and not bool(tokens.all())
