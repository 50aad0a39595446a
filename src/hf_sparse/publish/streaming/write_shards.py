"""Weights written as `save_pretrained` writes them, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ...checkpoint.weight_files import INDEX
from ...core.errors import CheckpointError

# The library's names of dtypes, in the order of a file's tensors, which after that have their
# names'.
ORDER = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANKS = {dtype: rank for rank, dtype in enumerate(ORDER)}


def write_shards(
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    folder: Path,
    metadata: Mapping[str, str],
    shard_size: int,
    parameters: int,
) -> None:
    """Write the files of a state dict, and an index if they are several.

    Args:
        tensors: the state dict, on meta.
        read: gives one of its tensors, in its shape and dtype.
        folder: where the files go.
        metadata: of each file.
        shard_size: bytes of a file, about; one with a larger tensor has that alone.
        parameters: how many the model has, for the index.

    Raises:
        CheckpointError: what was read has another shape or dtype.
    """
    split = split_torch_state_dict_into_shards(
        dict(tensors),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    for name, keys in split.filename_to_tensors.items():
        _write(folder / name, {key: tensors[key] for key in keys}, read, metadata)
    if split.is_sharded:
        about = {"total_parameters": parameters, **split.metadata}
        index = {"metadata": about, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def _write(
    path: Path,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    order = sorted(tensors, key=lambda key: (_RANKS[tensors[key].dtype], key))
    header = _header({key: tensors[key] for key in order}, order, metadata)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for key in order:
            tensor, expected = read(key), tensors[key]
            if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                raise CheckpointError(
                    f"{key} is a {tensor.dtype} of shape {tuple(tensor.shape)}, expected a "
                    f"{expected.dtype} of {tuple(expected.shape)}: what was kept of the run is of "
                    "another model, remove it with hf_sparse.clear_checkpoint"
                )
            if tensor.numel():
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _header(
    tensors: Mapping[str, Tensor], order: Sequence[str], metadata: Mapping[str, str]
) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for key in order:
        tensor = tensors[key]
        end = start + tensor.numel() * tensor.element_size()
        described = {"dtype": ORDER[tensor.dtype], "shape": list(tensor.shape)}
        content[key] = described | {"data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)
