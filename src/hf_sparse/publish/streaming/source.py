"""The dense checkpoint: any of the model's tensors, as transformers would load it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ...checkpoint.weight_files import weight_files
from ...core.errors import CheckpointError

_PIECE = 1 << 23


class SourceWeights:
    """Reads tensors through transformers' own conversions, and holds none.

    Args:
        folder: with safetensors files.
        model: what they are of, on meta; it stays there.
        dtype: that the model is loaded in.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.files = weight_files(folder)
        if not self.files:
            raise CheckpointError(
                f"{folder} has no safetensors files: load the model, and save it with "
                "save_pretrained first"
            )
        self.model, self._folder, self._dtype = model, folder, dtype
        self.expected: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        self._keys: dict[str, list[str]] = {}
        self._file_of: dict[str, Path] = {}
        self._index()

    def has(self, name: str) -> bool:
        """Do the files hold what a tensor of the model is made of?"""
        return bool(self._stored(name))

    def inside(self, module: str) -> list[str]:
        """Names of the tensors of a module of the model."""
        return [name for name in self.expected if name.startswith(f"{module}.")]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the model's tensors, by name, on the CPU.

        What several of them are made of together is read once; ask for a module's at once.

        Raises:
            CheckpointError: the files don't hold them, or in another shape.
        """
        names = list(names)
        keys = {key for name in names for key in self._stored(name)}
        tensors = {key: _InFile(self._file_of[key], key) for key in sorted(keys)}
        config = LoadStateDictConfig(
            dtype=self._dtype,
            dtype_plan=self.model._get_dtype_plan(self._dtype),
            weight_mapping=get_model_conversion_mapping(self.model),
            device_map={"": "cpu"},
        )
        try:
            with no_bars():
                convert_and_load_state_dict_in_model(self.model, tensors, config)
            return {name: self._loaded(name) for name in names}
        finally:
            self._empty()

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file, by its name."""
        return {path.name: file_digest(path) for path in self.files}

    def _loaded(self, name: str) -> Tensor:
        tie = self._ties.get(name)
        tensor = _get(self.model, name)
        if tensor.is_meta and tie is not None:
            tensor = _get(self.model, tie)
        if tensor.is_meta:
            raise CheckpointError(
                f"{self._folder}: its files have no {name} of shape "
                f"{tuple(self.expected[name].shape)}, which {type(self.model).__name__} needs"
            )
        return tensor.detach()

    def _empty(self) -> None:
        """Put the tensors on meta back, the same objects, so that ties stay ties."""
        for name, tensor in self.expected.items():
            parent, _, local = name.rpartition(".")
            module = self.model.get_submodule(parent)
            held = module._parameters if local in module._parameters else module._buffers
            held[local] = tensor  # type: ignore[assignment]

    @property
    def _ties(self) -> Mapping[str, str]:
        return getattr(self.model, "all_tied_weights_keys", None) or {}

    def _stored(self, name: str) -> list[str]:
        """Keys of the files from which a tensor is made."""
        return self._keys.get(name) or self._keys.get(self._ties.get(name, ""), [])

    def _index(self) -> None:
        """Where in the model each tensor of the files belongs, by transformers' own rules."""
        conversions = get_model_conversion_mapping(self.model)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        prefix, meta = self.model.base_model_prefix, self.model.state_dict()
        for path in self.files:
            for key in _keys(path):
                if key in self._file_of:
                    raise CheckpointError(f"{path}: {key} is in {self._file_of[key]}, too")
                self._file_of[key] = path
                name, _ = rename_source_key(key, renamings, converters, prefix, meta)
                if name not in meta and key in meta:
                    name, _ = rename_source_key(key, [], [], prefix, meta)
                self._keys.setdefault(name, []).append(key)


class _InFile:
    """A tensor that is read when transformers asks for it, by indexing."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key

    def __getitem__(self, index: Any) -> Tensor:
        try:
            # A mapping of its own, whose pages are gone when the copy is made.
            with safe_open(self._path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(self._key)
                return tensor[index].clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._path}: it can't be read: {error}") from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: it can't be read: {error}") from None


def _get(model: nn.Module, name: str) -> Tensor:
    parent, _, local = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(parent), local)
    return tensor


@contextmanager
def no_bars() -> Iterator[None]:
    """transformers would draw a bar for each block that it loads."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
