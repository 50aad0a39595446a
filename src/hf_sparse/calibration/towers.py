"""Which input the calibration data lack, told from the model's own forward and its towers'."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from torch import nn

# What a forward takes besides inputs, or makes for itself from another one.
NO_DATA = re.compile(
    r"self|args|kwargs|labels|.*_labels|.*embeds|use_.*|output_.*|return_.*|past_key_values|"
    r"position_ids|cache_position|logits_to_keep|.*mask|token_type_ids|encoder_outputs|.*position.*"
)


def missing_input(model: nn.Module, block: str, given: Iterable[str]) -> str | None:
    """The input that the data lack for a module that no data reached, and its tower, in words.

    A tower is a model inside the model: a module that declares its main input, as transformers'
    models do. None if the data have the main input of every tower around the module: then it is
    no lack of data that keeps the model from calling it.

    Args:
        model: the model whose forward takes the data.
        block: the module's name.
        given: names of the inputs that the data have.
    """
    given, lacking = set(given), lacking_inputs(model, given)
    dots = [i for i, letter in enumerate(block) if letter == "."]
    for name in (block, *(block[:i] for i in reversed(dots))):
        tower = model.get_submodule(name)
        wanted = getattr(tower, "main_input_name", None)
        if wanted is not None and wanted not in given and lacking:
            wanted = wanted if wanted in lacking else " or ".join(lacking)
            return f"the tower {name} ({type(tower).__name__}) needs {wanted}"
    return None


def lacking_inputs(model: nn.Module, given: Iterable[str]) -> list[str]:
    """Inputs that the model's forward takes and the data don't have."""
    taken = inspect.signature(model.forward).parameters
    return [name for name in taken if name not in given and not NO_DATA.fullmatch(name)]
