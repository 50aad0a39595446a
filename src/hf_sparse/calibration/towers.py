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


def describe_missing(model: nn.Module, unit: str, given: Iterable[str]) -> str:
    """Say which tower a module belongs to and which inputs the data lack for it.

    Args:
        model: the model whose forward takes the data.
        unit: name of a module that no data reached.
        given: names of the inputs that the data have.

    A tower is a model inside the model: a module that declares its main input, as transformers'
    models do, and another one than the whole model or than the data have.
    """
    given = sorted(given)
    taken = [n for n in inspect.signature(model.forward).parameters if not NO_DATA.fullmatch(n)]
    lacking = [name for name in taken if name not in given]
    text = f"the data have {', '.join(given)}"
    for name in _ancestors(unit):
        module = model.get_submodule(name)
        wanted = getattr(module, "main_input_name", None)
        if wanted is not None and wanted not in given:
            wanted = wanted if wanted in taken or not lacking else ", ".join(lacking)
            return f"the tower {name} ({type(module).__name__}) needs {wanted}, {text}"
    return f"{text}, the model also takes {', '.join(lacking)}" if lacking else text


def _ancestors(name: str) -> list[str]:
    """The modules that hold a module, outermost first, and itself."""
    return [name[:i] for i, letter in enumerate(name) if letter == "."] + [name]
