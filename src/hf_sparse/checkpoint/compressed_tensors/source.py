"""What an old checkpoint's config.json says: of which format it is, and the rest of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config.keys import QUANT_METHOD
from ...core.errors import CheckpointError
from ...core.json_records import read_json
from ..weight_files import POINTER
from .parameters import PARTS

WRITER = "compressed-tensors"
# Where versions before 0.8 and before 0.4 say what they did.
_CONFIG_KEYS = ("quantization_config", "compression_config", "sparsity_config")
_QUANTISED_KEYS = ("config_groups", "kv_cache_scheme", "transform_config")


def old_format(config: Mapping[str, Any], where: str) -> str:
    """The format of an old sparse checkpoint, from its config.json.

    Raises:
        CheckpointError: it is of another kind; one sentence that says which.
    """
    found = next((config[key] for key in _CONFIG_KEYS if config.get(key)), None)
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{where} is dense: convert is for compressed-tensors' sparse checkpoints; "
            "method='keep' packs the zeros of a dense one"
        )
    method = found.get("quant_method", WRITER)
    if method == QUANT_METHOD:
        raise CheckpointError(f"{where} is in hf_sparse's own format already: load it as it is")
    if method != WRITER:
        raise CheckpointError(
            f"{where} is quantised with {method!r}: convert is for {WRITER}' sparse checkpoints"
        )
    more = [key for key in _QUANTISED_KEYS if found.get(key)]
    more += [key for key in ("sparseml_quantization_config",) if config.get(key)]
    if more:
        raise CheckpointError(
            f"{where} is more than sparse: its {more[0]} says that {WRITER} quantised or "
            f"transformed it, too (format {found.get('format')!r}), which convert can't undo"
        )
    sparsity = found.get("sparsity_config", found)
    name = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if not isinstance(name, str) or name not in PARTS:
        raise CheckpointError(
            f"{where} is in {WRITER}' format {name!r}: convert reads {' and '.join(PARTS)}"
        )
    return name


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        content = read_json(path, any_number=True)  # a config may hold an infinity
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json: it is no model's folder") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: it holds no object")
    return content


def without_storage(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without a trace of how, and where, the weights were stored."""
    return {key: value for key, value in config.items() if key not in (*_CONFIG_KEYS, POINTER)}
