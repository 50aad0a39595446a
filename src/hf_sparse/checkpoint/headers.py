"""The sparse part of a safetensors checkpoint: which layers are packed, and how.

Every file's metadata has a key `hf_sparse` with the JSON object

    {"version": 1, "layers": {NAME: {"format": ..., "shape": [out, in], ...}}}

that describes all packed layers of the checkpoint; docs/format.md has the whole of it. A packed
layer's values are stored under the layer's own key NAME.weight, in their packed shape, so that a
reader that does not know the format stops at the shape instead of making up a weight. Nothing
here is trusted: names, sizes and dtypes are checked from the headers before a tensor is read,
contents right after.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config.keys import SAVE_KEY
from ..core.errors import CheckpointError, FormatError
from ..core.input_threshold import KEY_SHARE, KEY_THRESHOLD, InputThreshold
from ..core.low_rank import KEY_A, KEY_B, LowRank, check_low_rank_layout
from ..formats import Format, format_from_spec
from ..formats.base import check_layout, check_packed
from ..layers.axes import Axes
from .header import METADATA_KEY, VERSION, Header, read_header
from .save_id import check_one_save, check_single
from .weight_files import check_distinct, weight_files

LARGEST_SIDE = 2**31 - 1

# A module's bias and what starts with "weight": file, shape and dtype (None: an unusual one).
Found = dict[str, tuple[str, tuple[int, ...], torch.dtype | None]]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class PackedLayer:
    """A packed layer in a checkpoint, as its headers describe it.

    Attributes:
        name: the module's name.
        format: how it is packed.
        shape: (out, in).
        axes: those of the dense layer.
        low_rank: rank of the part beside the packed weight; 0 if there is none.
        layout: shape and dtype of each of its tensors, by local key.
        files: the file that holds each tensor, by local key.
        has_bias: is there a NAME.bias?
        threshold: up to where its inputs count as 0; None if all count.
    """

    name: str
    format: Format
    shape: tuple[int, int]
    axes: Axes
    low_rank: int = 0
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    has_bias: bool = False
    threshold: InputThreshold | None = None

    @property
    def file(self) -> str:
        """The file that holds its values."""
        return self.files["weight"]

    def description(self) -> dict[str, Any]:
        """The JSON object that the metadata keep."""
        transposed = {"transposed": True} if self.axes.transposed else {}
        spatial = {"spatial": self.axes.spatial} if self.axes.spatial else {}
        low_rank = {"low_rank": self.low_rank} if self.low_rank else {}
        return {
            "format": self.format.name,
            "shape": list(self.shape),
            **transposed,
            **spatial,
            **low_rank,
            **(self.threshold.description() if self.threshold else {}),
            **self.format.parameters(),
        }

    def read(self, key: str) -> Tensor:
        """One of its tensors, through a mapping of the file that ends when the tensor does."""
        path = self.files[key]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(f"{self.name}.{key}")
        except (SafetensorError, OSError) as error:
            raise _damaged(path, f"it can't be read: {error}") from None
        return tensor

    def check(self, tensors: Mapping[str, Tensor], low_rank: LowRank | None = None) -> None:
        """Raise a CheckpointError, with file and tensor, unless the contents agree."""
        file = self.file
        try:
            check_packed(self.format, tensors, self.shape)
            for key, tensor in tensors.items():
                _check_finite(key, tensor)
            if low_rank is not None:
                file = self.files[KEY_A]
                low_rank.check(self.shape)
        except FormatError as error:
            raise _damaged(file, f"{self.name}.{error}") from None


def _check_finite(key: str, tensor: Tensor) -> None:
    """Raise a FormatError if there is no number in a tensor of numbers."""
    extremes = tensor.aminmax() if tensor.is_floating_point() and tensor.numel() else ()
    # They are NaN if any value is, and take no temporary.
    if not all(extreme.isfinite() for extreme in extremes):
        raise FormatError(f"{key} holds NaN or infinite values")


def metadata(layers: Iterable[PackedLayer]) -> dict[str, str]:
    """The safetensors metadata that describe packed layers."""
    content = {"version": VERSION, "layers": {layer.name: layer.description() for layer in layers}}
    return {METADATA_KEY: json.dumps(content, separators=(",", ":"), sort_keys=True)}


def read_layers(files: Iterable[str | os.PathLike[str]]) -> dict[str, PackedLayer]:
    """The packed layers of a checkpoint, from its files' headers alone.

    Raises:
        CheckpointError: a file can't be read, is no safetensors file, has no or unknown sparse
            metadata, tensors that contradict them, or is of another save than the others; names
            file and tensor.
    """
    headers: dict[str, Header] = {}
    described: dict[str, dict[str, Any]] = {}
    for path in [os.fspath(file) for file in files]:
        first = next(iter(headers), path)
        if Path(path).parent != Path(first).parent:
            raise _damaged(path, f"it is in another folder than {first}")
        if not path.endswith(".safetensors"):
            raise _damaged(path, "a sparse checkpoint is stored in safetensors files only")
        header = read_header(path)
        layers = header.layers()
        if headers and layers != described:
            raise _damaged(path, f"its hf_sparse metadata differ from {first}'s")
        headers[path], described = header, layers
    check_distinct({path: header.tensors for path, header in headers.items()})
    check_one_save({path: header.metadata.get(SAVE_KEY) for path, header in headers.items()})
    tensors: dict[str, Found] = {}
    for path, header in headers.items():
        for key, tensor in header.tensors.items():
            module, _, local = key.rpartition(".")
            if local == "bias" or local.startswith("weight"):
                found = path, tensor.shape, _DTYPES.get(tensor.dtype)
                tensors.setdefault(module, {})[local] = found
    return {name: _describe(name, e, tensors.get(name, {})) for name, e in described.items()}


def read_folder(folder: str | os.PathLike[str]) -> tuple[list[Path], dict[str, PackedLayer]]:
    """The weight files of a checkpoint's folder and their packed layers; none of a folder without.

    Raises:
        CheckpointError: as of `read_layers`; or config.json is of another save.
    """
    files = weight_files(Path(folder))
    layers = read_layers(files)
    check_single(files)
    return files, layers


def _describe(name: str, entry: Mapping[str, Any], found: Found) -> PackedLayer:
    """One layer's entry, checked against its tensors as the headers list them."""
    has_bias = found.pop("bias", None) is not None
    file = found["weight"][0] if "weight" in found else next((v[0] for v in found.values()), "")
    parameters = dict(entry)
    shape, transposed = parameters.pop("shape", None), parameters.pop("transposed", False)
    spatial = parameters.pop("spatial", 0)
    rank = parameters.pop("low_rank", 0)
    valid = isinstance(shape, list) and len(shape) == 2 and isinstance(transposed, bool)
    if not valid or not all(type(n) is int and 0 < n <= LARGEST_SIDE for n in shape):
        raise _damaged(file, f"{name}: shape {shape!r} is not [out, in] in its hf_sparse metadata")
    if type(spatial) is not int or not 0 <= spatial <= 2 or (spatial and transposed):
        raise _damaged(file, f"{name}: spatial {spatial!r} is not 1 or 2 in its hf_sparse metadata")
    limits = [parameters.pop(key, None) for key in (KEY_THRESHOLD, KEY_SHARE)]
    try:
        threshold = None
        if limits != [None, None]:
            threshold = InputThreshold.read(*limits)
        fmt = format_from_spec(parameters)
        unknown = [key for key, value in found.items() if value[2] is None]
        if unknown:
            raise FormatError(f"{unknown[0]} has a dtype that no format uses")
        layout: Any = {key: (value[1], value[2]) for key, value in found.items()}
        packed = dict(layout)
        if "low_rank" in entry:
            if type(rank) is not int:
                raise FormatError(f"low_rank {rank!r} is no integer in its hf_sparse metadata")
            check_low_rank_layout(layout, (shape[0], shape[1]), rank)
            del packed[KEY_A], packed[KEY_B]
        check_layout(fmt, packed, (shape[0], shape[1]))
    except FormatError as error:
        raise _damaged(file, f"{name}.{error}") from None
    files = {key: value[0] for key, value in found.items()}
    axes = Axes(transposed, spatial)
    sides = shape[0], shape[1]
    return PackedLayer(name, fmt, sides, axes, rank, layout, files, has_bias, threshold)


def _damaged(path: str, what: str) -> CheckpointError:
    where = path or "the checkpoint"
    return CheckpointError(f"{where}: {what}")
