"""What the headers of a sparse checkpoint tell, without torch and without reading a tensor."""

from __future__ import annotations

import gc
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .failures import Failure, sentence
from .plain import (
    SAVE_KEY,
    CheckpointError,
    check_distinct,
    check_ids,
    check_one_save,
    check_single,
    parse_json,
    weight_files,
)

# As hf_sparse.checkpoint.headers has them.
METADATA_KEY = "hf_sparse"
VERSION = 1

_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes


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
    tensors: dict[str, Any] = {}
    try:
        if not folder.is_dir() and constants.HF_HUB_OFFLINE:
            folder = Path(huggingface_hub.snapshot_download(model, revision=revision))
        files = _local(folder) if folder.is_dir() else _remote(model, revision, config)
        if not files:
            raise errors.NotASafetensorsRepoError
        check_distinct({path: file.tensors for path, file in files.items()})
        for path, file in files.items():
            described |= _layers(path, file.metadata)
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
    packed: dict[str, dict[str, Any]] = {name: {} for name in described}
    for key, tensor in tensors.items():
        module, _, local = key.rpartition(".")
        if module in packed and local.startswith("weight"):
            packed[module][local] = tensor
    layers = tuple(_layer(model, name, entry, packed[name]) for name, entry in described.items())
    try:
        check_single(files if folder.is_dir() else ())
    except CheckpointError as error:
        raise Failure(str(error)) from None
    return Headers(layers, len(tensors), len(files), sum(map(_bytes, tensors.values())))


def _local(folder: Path) -> dict[str, Any]:
    """The parsed header of each file of a folder's checkpoint, by path."""
    from huggingface_hub import hf_api

    parse = hf_api.parse_local_safetensors_file_metadata
    files = {path: parse(path) for path in weight_files(folder)}
    for path, file in files.items():
        _check_size(path, file)
    check_one_save({str(path): _save_id(file) for path, file in files.items()})
    return {str(path): file for path, file in files.items()}


def _remote(model: str, revision: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The same on the Hub."""
    import huggingface_hub

    found = huggingface_hub.get_safetensors_metadata(model, revision=revision)
    files = {f"{model}/{name}": file for name, file in found.files_metadata.items()}
    if found.sharded:  # the id of a single file is taken of its content
        ids = {path: _save_id(file) for path, file in files.items()}
        check_ids(ids, config, {"metadata": found.metadata})
    return files


def _save_id(file: Any) -> str | None:
    return (file.metadata or {}).get(SAVE_KEY)


def _check_size(path: Path, file: Any) -> None:
    """A file that was cut short has whole headers: compare its size with what they promise."""
    with path.open("rb") as stream:
        (header,) = struct.unpack("<Q", stream.read(8))
    end = max((tensor.data_offsets[1] for tensor in file.tensors.values()), default=0)
    expected, found = 8 + header + end, path.stat().st_size
    if found != expected:
        raise Failure(f"{path} has {found} bytes, its header tells of {expected}: it is damaged")


def _layers(where: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The packed layers that one file's metadata describe."""
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise Failure(f"{where} has no hf_sparse metadata: was it rewritten by another tool?")
    content = parse_json(text, f"{where}: its hf_sparse metadata", Failure)
    try:
        version, layers = content["version"], content["layers"].items()
    except (TypeError, KeyError, AttributeError):
        raise Failure(f"{where}: its hf_sparse metadata are damaged") from None
    if version != VERSION:
        raise Failure(
            f"{where}: format version {version!r} is not known, this hf-sparse reads {VERSION}; "
            "a newer one may help"
        )
    return dict(layers)


def _layer(model: str, name: str, entry: Any, tensors: Mapping[str, Any]) -> StoredLayer:
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
        bytes=sum(map(_bytes, tensors.values())),
        bytes_dense=dense * _FLOATS[values.dtype] if plain else None,
    )


def _bytes(tensor: Any) -> int:
    begin, end = tensor.data_offsets
    return int(end - begin)
