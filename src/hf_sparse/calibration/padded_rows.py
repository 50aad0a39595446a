"""For each layer of a model, by what it is told which rows are padding; said where it is not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial

from torch import nn

from ..core.logging import get_logger
from ..layers.blocks import Block
from .batches import Batch
from .block_masks import told_by_blocks
from .forward import call_model
from .frames import MASK, frame_masks
from .padding import MASKS, Told, count_rows, count_rows_without, is_padded, mask_owners, shape_of
from .token_masks import may_pad

logger = get_logger(__name__)

Run = Callable[[Batch], object]


def find_told(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    experts: Collection[nn.Module],
) -> Told:
    """Run the model on batches with padding, if there are any, and see.

    Args:
        model: in eval mode.
        blocks: of the model.
        batches: the data.
        layers: those that are pruned, by name.
        experts: modules whose first input is (rows, channels).
    """
    run, modules = partial(call_model, model), [*layers.values(), *experts]
    owners = mask_owners(run, batches, modules)
    frames = frame_masks(model, run, batches, modules)
    known = set(frames).union(*owners.values())
    untold: dict[str, set[nn.Module]] = {}
    handed: set[nn.Module] = set()
    for name, batch in _padded(batches):
        found = _suspects(run, batch, name, set(modules) - known)
        if found:
            count = partial(count_rows, run, batch, found)
            handed |= told_by_blocks(count, [block.module for block in blocks], found)
        untold[name] = untold.get(name, set()) | found
    used = {name for name, found in owners.items() if found} | ({MASK} if frames else set())
    used |= {name for name, found in untold.items() if found & handed}
    rest = set().union(*(found for name, found in untold.items() if name in used)) - handed
    _warn(sorted(set(untold) - used), [n for n, module in layers.items() if module in rest])
    return Told(owners, frames, handed)


def _padded(batches: Sequence[Batch]) -> list[tuple[str, Batch]]:
    """Masks that may mark padding, each with a batch for each set of inputs."""
    found = {
        (name, frozenset(batch)): batch
        for batch in batches
        for name in batch
        if (name in MASKS or name.endswith(("pixel_mask", "pixel_attention_mask", "padding_mask")))
        and may_pad(batch[name])
    }
    return [(name, batch) for (name, _), batch in found.items()]


def _suspects(run: Run, batch: Batch, name: str, modules: AbstractSet[nn.Module]) -> set[nn.Module]:
    """The modules of whose rows some may be padding, by a mask.

    Those that get fewer rows without the last quarter of its tokens; of a mask that goes with no
    tokens, those that get neither the rows of the ids nor one for each sample.
    """
    if not modules:
        return set()
    rows = count_rows(run, batch, modules)
    called = {module for module in modules if rows[module]}
    samples = len(batch[name])
    if name in MASKS and is_padded(batch[name]):
        samples, tokens = shape_of(batch, name)
        fewer = count_rows_without(run, batch, name, tokens // 4, modules) or rows
        return {
            module
            for module in called
            if rows[module] != fewer[module] and not any(n % samples for n in rows[module])
        }
    ids = {batch[key].numel() for key in ("input_ids", "decoder_input_ids") if key in batch}
    return {module for module in called if {*ids, samples}.isdisjoint(rows[module])}


def _warn(unused: Sequence[str], layers: Sequence[str]) -> None:
    """Say once which masks are no use, and of which layers it can't be told what is padding."""
    if unused:
        logger.warning(
            "%s of the calibration data may mark padding, and no layer has a row for each of its "
            "entries: padding counts in the statistics; batches without padding avoid it",
            " and ".join(unused),
        )
    if layers:
        logger.warning(
            "it can't be told which rows of %d layers are padding: it counts in the statistics of "
            "%s%s; batches without padding avoid it",
            len(layers),
            ", ".join(layers[:4]),
            ", ..." if len(layers) > 4 else "",
        )
