"""One forward pass of a model over a batch of calibration data, and which inputs these lack."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.errors import CalibrationError, HfSparseError
from ..core.input_device import input_device
from .batches import Batch

# What a forward takes besides inputs, or makes for itself from another one.
NO_DATA = re.compile(
    r"self|args|kwargs|labels|.*_labels|.*embeds|use_.*|output_.*|return_.*|cache|past_key_values|"
    r"position_ids|cache_position|logits_to_keep|.*mask|token_type_ids|encoder_outputs|.*position.*"
)


def call_model(model: nn.Module, batch: Batch) -> Any:
    """The model's outputs for a batch, whose floating-point inputs become of the model's dtype.

    Raises:
        CalibrationError: it can't run on these data; names what they have and lack.
    """
    device = input_device(model)
    dtype = getattr(model, "dtype", None)  # processors give fp32 pixels and audio
    # One made within `torch.inference_mode` can't be saved for a backward pass.
    ordinary = {k: v.clone() if v.is_inference() else v for k, v in batch.items()}
    inputs = {key: value.to(device) for key, value in ordinary.items()}
    floats = {k: v.to(dtype) for k, v in inputs.items() if dtype and v.is_floating_point()}
    try:
        return model(**inputs | floats)
    except (HfSparseError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CalibrationError(
            f"{type(model).__name__} can't run on the calibration data: "
            f"{type(error).__name__}: {error}. The data have {', '.join(sorted(batch))}; it "
            f"also takes {', '.join(lacking_inputs(model, batch)) or 'nothing else'}"
        ) from error


# What a config may ask a model to keep or return beside its outputs, and what a run has instead: a
# block is run more than once on the same inputs, and everything kept waits with each batch.
PLAIN = {
    "use_cache": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """No key-value caches, attention maps or hidden states, whatever the model's configs say."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    before = []
    for config in {id(config): config for config in found if hasattr(config, "__dict__")}.values():
        held = vars(config)
        before.append((held, {name: held[name] for name in _settings(held)}))
    try:
        for held, values in before:
            held.update({name: PLAIN[name.removeprefix("_")] for name in values})
        yield
    finally:
        for held, values in before:
            held.update(values)


def _settings(held: dict[str, Any]) -> list[str]:
    """Those of PLAIN that a config has; some stand behind a property."""
    return [name for name in held if name.removeprefix("_") in PLAIN]


def missing_input(model: nn.Module, block: str, given: Iterable[str]) -> str | None:
    """The input that the data lack for a module that no data reached, and what takes it, in words.

    That is an encoder or another model inside the model: a module that declares its main input, as
    transformers' models do. None if the data have the main input of each such module around this
    one: then it is no lack of data that keeps the model from calling it.

    Args:
        model: the model whose forward takes the data.
        block: the module's name.
        given: names of the inputs that the data have.
    """
    given, lacking = set(given), lacking_inputs(model, given)
    dots = [i for i, letter in enumerate(block) if letter == "."]
    for name in (block, *(block[:i] for i in reversed(dots))):
        inner = model.get_submodule(name)
        wanted = getattr(inner, "main_input_name", None)
        if wanted is not None and wanted not in given and lacking:
            wanted = wanted if wanted in lacking else " or ".join(lacking)
            return f"{name} ({type(inner).__name__}) needs {wanted}"
    return None


def lacking_inputs(model: nn.Module, given: Iterable[str]) -> list[str]:
    """Inputs that the model's forward takes and the data don't have."""
    taken = inspect.signature(model.forward).parameters
    return [name for name in taken if name not in given and not NO_DATA.fullmatch(name)]
