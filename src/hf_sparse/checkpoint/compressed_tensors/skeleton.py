"""Under which names this version of transformers keeps what an older one wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from ...layers.experts import is_fused
from .parameters import StoredParameter

# Buffers that files of older versions of transformers hold, and no longer needs.
_FORMER_BUFFERS = r"(rotary_emb\.inv_freq|(^|\.)position_ids)$"


@dataclass(frozen=True)
class Place:
    """Where a stored parameter belongs in memory: it is one of `parts` runs of a weight's rows.

    An expert's weight is called as in experts that are layers of their own (`SparseExperts`);
    `experts` is the name of the module that has them fused.
    """

    name: str
    part: int = 0
    parts: int = 1
    experts: str | None = None


def renaming(
    model: PreTrainedModel, expected: dict[str, Tensor]
) -> Callable[[StoredParameter], Place | None]:
    """A function from a stored parameter to its place in memory, as transformers would load it.

    It gives None for what the model has not, and raises a CheckpointError for what takes more than
    a new name, or a place among the experts. `expected` is the model's state dict.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    fused = {name for name, module in model.named_modules() if is_fused(module)}

    def rename(parameter: StoredParameter) -> Place | None:
        merged = False
        for name in parameter.names:
            renamed, pattern = rename_source_key(
                name, renamings, converters, model.base_model_prefix, expected
            )
            if pattern is None and renamed in expected:
                return Place(str(renamed))
            if pattern is not None:
                place = _expert_place(name, renamed, pattern, by_pattern[pattern])
                if place and place.experts in fused and renamed in expected:
                    return place
                merged = True
        if merged:
            raise parameter.origin.error(
                "is one of several weights that this transformers merges into one, or one that it "
                "splits, and no expert's: such models can't be converted"
            )
        return None

    return rename


def _expert_place(name: str, fused: str, pattern: str, converter: WeightConverter) -> Place | None:
    """The place of one expert's weight, if all that the converter does is to fuse such weights."""
    merge, *join = converter.operations
    parts = len(converter.source_patterns)
    fuses = isinstance(merge, MergeModulelist) and merge.dim == 0
    # Rows: the first dimension of an expert's weight, the second one of the fused weight.
    joins = len(join) == 1 and isinstance(join[0], Concatenate) and join[0].dim == 1
    before, star, after = pattern.partition("*")
    number = re.search(re.escape(before) + r"(\d+)" + re.escape(after), name)
    if not (fuses and star and number and (joins if parts > 1 else not join)):
        return None
    experts, _, local = fused.rpartition(".")
    place = converter.source_patterns.index(pattern)
    return Place(f"{experts}.{number[1]}.{local}.weight", place, parts, experts)


def is_needed(model: PreTrainedModel, key: str) -> bool:
    """Is a tensor that the model has no place for an error? Some are known to be left over."""
    return not _matches((*(model._keys_to_ignore_on_load_unexpected or ()), _FORMER_BUFFERS), key)


def may_be_missing(model: PreTrainedModel, name: str) -> bool:
    """Does the model make up for a tensor that no file has?"""
    return _matches(model._keys_to_ignore_on_load_missing or (), name)


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
