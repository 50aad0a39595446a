"""The folder of the result: what is copied, config.json, and the weights, one file at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...config.sparse_config import SparseConfig
from ...core.logging import get_logger, progress_bar
from ..headers import metadata
from ..weight_files import INDEX, SINGLE
from .plan import Item
from .source import without_storage

logger = get_logger(__name__)

# Weights in other forms: of no use beside the converted ones.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def copy_others(source: Path, staging: Path) -> None:
    """Copy what is neither weights nor config.json nor hidden, and no link that leads elsewhere."""
    folder = source.resolve()
    # In the Hub's cache a snapshot's files are links to the blobs of its repository.
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        left = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if hidden or left or relative == Path("config.json") or not path.is_file():
            continue
        if not {folder, blobs}.intersection(path.resolve().parents):
            logger.warning("%s is not copied: it leads out of the folder", str(path))
            continue
        (staging / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, staging / relative)


def write_config(config: Mapping[str, Any], staging: Path) -> None:
    described = without_storage(config) | {
        "quantization_config": SparseConfig(method="keep").to_dict()
    }
    _write_json(staging / "config.json", described)


def write_weights(items: Sequence[Item], staging: Path, limit: int) -> None:
    """Write the files, and an index if they are several."""
    header = {"format": "pt"} | metadata(item.layer for item in items if item.layer)
    shards = _shards(items, limit)
    weight_map: dict[str, str] = {}
    total = 0
    with progress_bar(len(items), "Converting") as bar:
        for number, shard in enumerate(shards, 1):
            several = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = SINGLE if len(shards) == 1 else several
            tensors: dict[str, Tensor] = {}
            for item in shard:
                tensors |= item.tensors()
                bar.update()
            save_file(tensors, staging / file, header)
            weight_map |= dict.fromkeys(tensors, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(items: Sequence[Item], limit: int) -> list[list[Item]]:
    """Cut into runs of at most `limit` bytes; an item that has more is a run of its own."""
    shards: list[list[Item]] = [[]]
    used = 0
    for item in items:
        if shards[-1] and used + item.bytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(item)
        used += item.bytes
    return shards


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
