"""Numbers in a config.json with which a model can't, or mustn't, be built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..core.errors import CheckpointError
from .headers import LARGEST_SIDE

# Keys by what they count, and up to which number a model is built: parts, each of which takes time
# and memory even without weights, and sides of tensors.
_PARTS = re.compile(r"n_layer|(.*_)?(layers|depths?|blocks|experts)")
_SIDES = re.compile(r"(.*_)?(size|dim|embd|positions|embeddings|channels|heads?|model|ff|inner)")
_MOST_PARTS = 20_000
# Keys without which no model has weights.
_NEEDED = ("hidden_size", "d_model", "n_embd", "vocab_size", "num_attention_heads", "n_head")
# In all.
_MOST_MODULES = 500_000


def check_numbers(config: Mapping[str, Any], folder: Path) -> None:
    """Raise a CheckpointError if a number in the content of a config.json, or of a config in it, is
    out of the question; names it."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_numbers(value, folder)
            continue
        limit = _MOST_PARTS if _PARTS.fullmatch(key) else LARGEST_SIDE
        known = _PARTS.fullmatch(key) or _SIDES.fullmatch(key)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and known and number > limit:
                raise _refused(folder, key, number, f"at most {limit}")
        if isinstance(value, int) and key in _NEEDED and value < 1:
            raise _refused(folder, key, value, "at least 1")
        if isinstance(value, int) and value < 0 and _PARTS.fullmatch(key):
            raise _refused(folder, key, value, "at least 0")


@contextmanager
def bounded_modules(model: object) -> Iterator[None]:
    """No more modules are made within than the largest models have: a CheckpointError comes first.

    It counts those of all threads.
    """
    made = 0

    def count(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal made
        made += 1
        if made > _MOST_MODULES:
            raise CheckpointError(
                f"{model}: its config.json describes more than {_MOST_MODULES} modules, "
                "which no model has"
            )

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _refused(folder: Path, key: str, number: int, expected: str) -> CheckpointError:
    return CheckpointError(f"{folder}: config.json has {key} {number!s:.40}, expected {expected}")
