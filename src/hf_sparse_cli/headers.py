"""What the headers of a sparse checkpoint tell, without torch and without reading a tensor."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .failures import Failure, sentence
from .plain import (
    SAVE_KEY,
    CheckpointError,
    Header,
    HeaderTensor,
    check_distinct,
    check_ids,
    check_one_save,
    check_single,
    read_header,
    weight_files,
)

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredLayer:
    """A packed layer.

    Attributes:
        name: the module's name.
        format: how it is packed, and the format's parameters.
        shape: (out, in).
        dtype: of the stored values.
        sparsity: 1 - stored values / (out * in); None if values are packed several to an element.
        bytes: of its packed tensors.
        bytes_dense: of the dense weight in the values' dtype; None where `sparsity` is.
    """

    name: str
    format: str
    shape: tuple[int, int]
    dtype: str
    sparsity: float | None
    bytes: int
    bytes_dense: int | None


@dataclass(frozen=True)
class Headers:
    """A checkpoint's headers.

    Attributes:
        layers: the packed layers.
        tensors: number of all tensors.
        files: number of safetensors files.
        bytes: of all tensors.
    """

    layers: tuple[StoredLayer, ...]
    tensors: int
    files: int
    bytes: int


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: it would go through 100,000 entries that stay, over and over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def read_headers(model: str, revision: str | None, config: Mapping[str, Any]) -> Headers:
    """Read all headers of a checkpoint: of a folder, or of a Hub id by asking for these bytes only.

    Args:
        model: a folder or a Hub id.
        revision: of a Hub id.
        config: the content of its config.json.

    Raises:
        Failure: no safetensors files, a damaged one, or none that hf_sparse wrote; or files of
            several saves.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    folder = Path(model).expanduser()
    described: dict[str, Any] = {}
    tensors: dict[str, HeaderTensor] = {}
    try:
        if not folder.is_dir() and constants.HF_HUB_OFFLINE:
            folder = Path(huggingface_hub.snapshot_download(model, revision=revision))
        files = _local(folder) if folder.is_dir() else _remote(model, revision, config)
        if not files:
            raise errors.NotASafetensorsRepoError
        check_distinct({path: file.tensors for path, file in files.items()})
        for file in files.values():
            described |= file.layers()
            tensors |= file.tensors
    except errors.NotASafetensorsRepoError:
        where = " in the cache, and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise Failure(f"{model} has no model.safetensors or index of several{where}") from None
    except CheckpointError as error:
        raise Failure(str(error)) from None
    except (errors.SafetensorsParsingError, TypeError, AttributeError, ValueError) as error:
        raise Failure(f"{model}: {error}") from None
    except OSError as error:
        raise Failure(f"the files of {model} can't be read: {sentence(error)}") from error
    packed: dict[str, dict[str, HeaderTensor]] = {name: {} for name in described}
    for key, tensor in tensors.items():
        module, _, local = key.rpartition(".")
        if module in packed and local.startswith("weight"):
            packed[module][local] = tensor
    layers = tuple(_layer(model, name, entry, packed[name]) for name, entry in described.items())
    try:
        check_single(files if folder.is_dir() else ())
    except CheckpointError as error:
        raise Failure(str(error)) from None
    return Headers(layers, len(tensors), len(files), sum(t.bytes for t in tensors.values()))


def _local(folder: Path) -> dict[str, Header]:
    """The header of each file of a folder's checkpoint, by path."""
    headers = {str(path): read_header(path) for path in weight_files(folder)}
    check_one_save({path: header.metadata.get(SAVE_KEY) for path, header in headers.items()})
    return headers


def _remote(model: str, revision: str | None, config: Mapping[str, Any]) -> dict[str, Header]:
    """The same on the Hub."""
    import huggingface_hub

    found = huggingface_hub.get_safetensors_metadata(model, revision=revision)
    headers = {}
    for name, file in found.files_metadata.items():
        tensors = {k: HeaderTensor(tuple(t.shape), t.dtype) for k, t in file.tensors.items()}
        path = f"{model}/{name}"
        headers[path] = Header(path, file.metadata or {}, tensors)
    if found.sharded:  # the id of a single file is taken of its content
        ids = {path: header.metadata.get(SAVE_KEY) for path, header in headers.items()}
        check_ids(ids, config, {"metadata": found.metadata})
    return headers


def _layer(model: str, name: str, entry: Any, tensors: Mapping[str, HeaderTensor]) -> StoredLayer:
    try:
        (rows, columns), values = entry["shape"], tensors["weight"]
        parameters = [f"{k} {v}" for k, v in sorted(entry.items()) if k not in ("format", "shape")]
        if min(rows, columns) < 1:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise Failure(f"{model}: what it stores of {name} is damaged or incomplete") from None
    dense = rows * columns
    plain = values.dtype in _FLOATS
    return StoredLayer(
        name=name,
        format=", ".join([str(entry.get("format")), *parameters]),
        shape=(rows, columns),
        dtype=values.dtype,
        sparsity=1 - math.prod(values.shape) / dense if plain else None,
        bytes=sum(tensor.bytes for tensor in tensors.values()),
        bytes_dense=HeaderTensor((rows, columns), values.dtype).bytes if plain else None,
    )
