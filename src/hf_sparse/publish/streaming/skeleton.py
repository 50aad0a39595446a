"""A dense checkpoint opened without its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel

from ...checkpoint.compressed_tensors.source import read_config
from ...checkpoint.skeleton import empty_model
from ...checkpoint.weight_files import weight_files
from ...core.errors import CheckpointError, ConfigError
from .source import file_digest

# What is fetched from the Hub: no weights in other forms, and nothing that is code.
FETCHED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights.

    Attributes:
        folder: where its files are.
        name: folder or Hub id, as it was asked for.
        content: of its config.json.
        dtype: of its weights.
        twin: the model on meta; it stays as the checkpoint has it.
    """

    folder: Path
    name: str
    content: Mapping[str, Any]
    dtype: torch.dtype
    twin: PreTrainedModel

    def model(self) -> PreTrainedModel:
        """The same again, to be pruned: on meta, but for what is computed from its config.

        Raises:
            CheckpointError: that doesn't fit into memory.
        """
        model = _empty(self.content, self.folder, self.dtype, self.name)
        _check_buffers(model, self.folder)
        _compute_buffers(model)
        if model.can_generate():
            model.generation_config = _generation_config(self.folder)
        return model

    def digest(self) -> str:
        """SHA-256 of config.json."""
        return file_digest(self.folder / "config.json")


def open_checkpoint(
    model_id_or_path: str | os.PathLike[str],
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    weights: bool = True,
) -> Skeleton:
    """Read a checkpoint's config and headers.

    Args:
        model_id_or_path: a folder, or a Hub id that is downloaded to the cache.
        revision: branch, tag or commit of a Hub id.
        dtype: as for `from_pretrained`.
        weights: fetch those, too.

    Raises:
        CheckpointError: there is no such model, or not in safetensors files.
        ConfigError: dtype is none, or the model neither a folder nor an id.
    """
    if not isinstance(model_id_or_path, str | os.PathLike):
        raise ConfigError(
            f"a model's folder or its id on the Hub is needed, found {model_id_or_path!r:.80}"
        )
    folder = Path(model_id_or_path).expanduser()
    if not folder.is_dir():
        try:
            fetched = snapshot_download(
                str(model_id_or_path),
                revision=revision,
                allow_patterns=list(FETCHED[not weights :]),
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"there is no folder {str(model_id_or_path)!r}, and from the Hub: {error}"
            ) from error
        folder = Path(fetched)
    content = read_config(folder)
    if "quantization_config" in content:
        raise CheckpointError(f"{folder} is quantised or sparse already: prune the dense model")
    chosen = _dtype(dtype, content, folder)
    name = str(model_id_or_path)
    return Skeleton(folder, name, content, chosen, _empty(content, folder, chosen, name))


def _empty(
    content: Mapping[str, Any], folder: Path, dtype: torch.dtype, name: str
) -> PreTrainedModel:
    model = empty_model(content, folder, dtype)
    model.config.name_or_path = model.name_or_path = name
    return model.eval()


def _dtype(asked: str | torch.dtype, content: Mapping[str, Any], folder: Path) -> torch.dtype:
    """As of `from_pretrained`: "auto" is the config's, or else that of the first weight."""
    named = content.get("dtype") or content.get("torch_dtype")
    if asked != "auto":
        named = asked
    if named is None:
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    found: torch.dtype = file.get_tensor(key).dtype
                    if found.is_floating_point:
                        return found
    if named is None:
        raise ConfigError(
            f"the config.json of {folder} names no dtype, and there are no weights: pass "
            "dtype=torch.bfloat16 or another one"
        )
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(
            f"dtype {named!r} is not known: pass 'auto' or a floating-point dtype of torch"
        )
    return dtype


def _check_buffers(model: PreTrainedModel, folder: Path) -> None:
    """Raise a CheckpointError if a config asks for more of them than there is memory."""
    buffers = dict(model.named_buffers())
    needed, free = sum(b.nbytes for b in buffers.values()), psutil.virtual_memory().available
    if needed > free:
        name, largest = max(buffers.items(), key=lambda item: item[1].nbytes)
        raise CheckpointError(
            f"{folder}: with what config.json says the model's buffers take {needed / 1e9:.2f} GB, "
            f"and {free / 1e9:.2f} GB are free: {name} has the shape {tuple(largest.shape)}"
        )


def _compute_buffers(model: PreTrainedModel) -> None:
    """Buffers that no file has, such as the frequencies of rotary embeddings."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model._move_missing_keys_from_meta_to_device(set(), {"": "cpu"}, None, None)
    model.initialize_weights()


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
