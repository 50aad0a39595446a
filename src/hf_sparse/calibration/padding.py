"""Which rows of a layer's input are padding.

A batch has masks (samples, tokens) beside its inputs; a layer gets rows. Those of a decoder, or the
patches of an image, may be as many as the tokens of a mask that isn't theirs. So it is tried: the
inputs that a mask goes with lose their last token, and the layers that then get a row less for each
sample have that mask's tokens. Layers whose rows are frames of sound are told by `frames`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..core.errors import CalibrationError
from ..core.logging import get_logger
from ..layers.axes import Axes
from .batches import Batch
from .hooks import hooked

logger = get_logger(__name__)

# Each mask, and how the names of the inputs begin that it goes with.
MASKS = {"attention_mask": "", "decoder_attention_mask": "decoder_"}


@dataclass(frozen=True)
class Padding:
    """What is padding in one batch.

    Attributes:
        masks: (samples, tokens), true where there is a token; those that say so everywhere are
            left out.
        owners: the modules whose rows are a mask's tokens.
        frames: for modules whose rows are frames, what makes their mask of `attention_mask`: a
            function of the frames of each sample and that mask.
    """

    masks: Mapping[str, Tensor] = field(default_factory=dict)
    owners: Mapping[str, AbstractSet[nn.Module]] = field(default_factory=dict)
    frames: Mapping[nn.Module, Callable[[int, Tensor], Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        batch: Batch,
        owners: Mapping[str, AbstractSet[nn.Module]],
        frames: Mapping[nn.Module, Callable[[int, Tensor], Tensor]],
    ) -> Padding:
        masks = {n: batch[n].bool() for n in MASKS if is_padded(batch.get(n))}
        return cls(masks, owners, frames)

    def tokens(self, module: nn.Module, rows: int) -> Tensor | None:
        """Which of a module's rows are no padding, shape (rows,); None if all are."""
        for name, mask in self.masks.items():
            if module in self.owners[name] and mask.numel() == rows:
                return mask.flatten()
        sound = self.masks.get("attention_mask")
        if module in self.frames and sound is not None and rows % len(sound) == 0:
            return self.frames[module](rows // len(sound), sound).flatten()
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


def warn_of_unused_masks(batches: Sequence[Batch], used: AbstractSet[str]) -> None:
    """Say so, once, if masks of the data seem to mark padding and are no use.

    Args:
        batches: the data.
        used: names of masks that some layer's rows are told by.
    """
    may_pad = {name for batch in batches for name in batch if _may_pad(name, batch[name])}
    if unused := sorted(may_pad - used):
        logger.warning(
            "%s of the calibration data may mark padding, and no layer has a row for each of its "
            "entries: padding counts in the statistics; batches without padding avoid it",
            " and ".join(unused),
        )


def _may_pad(name: str, mask: Tensor) -> bool:
    known = name in MASKS or name.endswith(("pixel_mask", "padding_mask"))
    return known and bool((mask != mask.flatten()[0]).any())


def _owners(
    run: Callable[[Batch], object], batch: Batch, name: str, modules: Collection[nn.Module]
) -> set[nn.Module]:
    samples, tokens = batch[name].shape
    rows = count_rows(run, batch, modules)
    try:
        fewer = count_rows(run, without_last(batch, name, 1), modules) if tokens > 1 else rows
    except CalibrationError:
        fewer = rows
    expected = samples * tokens, samples * tokens - (0 if fewer is rows else samples)
    return {module for module in rows if expected in zip(rows[module], fewer[module], strict=False)}


def without_last(batch: Batch, name: str, tokens: int) -> Batch:
    """The batch without the last tokens of the inputs that a mask goes with."""
    others = tuple(prefix for prefix in MASKS.values() if prefix > MASKS[name])
    cut = {}
    for key, value in batch.items():
        own = key.startswith(MASKS[name]) and not key.startswith(others)
        aligned = own and value.shape[:2] == batch[name].shape
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
    """Does a mask (samples, tokens) mark any padding?"""
    return mask is not None and mask.ndim == 2 and not bool(mask.all())
