"""The header of one safetensors file, read without torch: the command line reads it, too."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from safetensors import SafetensorError, safe_open

from ..core.errors import CheckpointError
from ..core.json_records import parse_json

METADATA_KEY = "hf_sparse"
VERSION = 1


@dataclass(frozen=True)
class HeaderTensor:
    """A tensor as a header lists it; `dtype` is safetensors' name."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """What it takes in the file."""
        return -(-math.prod(self.shape) * _bits(self.dtype) // 8)


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        path: the file.
        metadata: strings by key.
        tensors: by key.
    """

    path: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, HeaderTensor]

    def layers(self) -> dict[str, dict[str, Any]]:
        """The entry of each packed layer of the checkpoint, by name.

        Raises:
            CheckpointError: there are none, or of another version; names the file.
        """
        text = self.metadata.get(METADATA_KEY)
        if text is None:
            raise CheckpointError(
                f"{self.path}: it has no hf_sparse metadata: was it rewritten by another tool, or "
                "saved from a dense model with the config of a sparse one? Then delete "
                "quantization_config in config.json"
            )
        content = parse_json(text, f"{self.path}: its hf_sparse metadata")
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise CheckpointError(
                f"{self.path}: format version {version!r} is not known, this hf_sparse reads "
                f"version {VERSION}; a newer one may help"
            )
        layers = content.get("layers")
        if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
            raise CheckpointError(f"{self.path}: its hf_sparse metadata have no object 'layers'")
        return layers


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a file; the library has checked that all tensors lie within it.

    Raises:
        CheckpointError: it can't be read, or is no safetensors file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            tensors = {
                key: HeaderTensor(tuple(part.get_shape()), part.get_dtype())
                for key, part in parts.items()
            }
            return Header(os.fspath(path), file.metadata() or {}, tensors)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: it can't be read: {error}") from None


@cache
def _bits(dtype: str) -> int:
    """Dtypes have their bits as their name's first number; BOOL takes 8."""
    digits = "".join(c if c.isdigit() else " " for c in dtype).split()
    return int(digits[0]) if digits else 8
