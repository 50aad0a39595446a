"""compressed-tensors' old sparse checkpoints -> this project's format, one layer after the other.

The weights are gone through twice. First everything is checked and every layer gets its format,
since each file's header describes all layers; then the files are written, one at a time. No more
than one file of the result, and the layer at work, is ever in memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .checkpoint import PackedLayer, metadata
from .config import QUANT_METHOD, SparseConfig
from .errors import CheckpointError, ConfigError, SaveError
from .formats import Dense, choose_format, pack_weight
from .layers.experts import SparseExperts, tied_experts, unfuse
from .legacy import (
    INDEX,
    PARTS,
    SINGLE,
    MergedParameter,
    Parameter,
    StoredParameter,
    read_parameters,
    weight_files,
)
from .logging import progress_bar
from .patterns import Unstructured
from .quantizer import default_dense
from .saving import write_folder
from .skeleton import empty_model, is_needed, may_be_missing, renaming
from .targets import Target, find_routers, select_targets

WRITER = "compressed-tensors"
# Where versions before 0.8 and before 0.4 say what they did.
_CONFIG_KEYS = ("quantization_config", "compression_config", "sparsity_config")
_QUANTISED_KEYS = ("config_groups", "kv_cache_scheme", "transform_config")
# Weights in other forms: of no use beside the converted ones.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` did.

    Attributes:
        layers: the format of each layer that is packed now, by name.
        dense: number of parameters that are stored dense.
        bytes_before: of the source's safetensors files.
        bytes_after: of the target's.
    """

    layers: Mapping[str, str]
    dense: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class _Number:
    """What `SparseExperts` has under a fused weight's name: how many experts there are."""

    experts: int

    def dense(self) -> Tensor:
        return torch.tensor([self.experts])


@dataclass(frozen=True)
class _Item:
    """A parameter under its name in the model; with a layer if it is to be packed.

    `bytes` is what it takes in the result, at most.
    """

    name: str
    parameter: Parameter | _Number
    bytes: int
    layer: PackedLayer | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What is to be written, by key."""
        dense = self.parameter.dense()
        if self.layer is None:
            return {self.name: dense}
        packed = pack_weight(self.layer.format, self.layer.axes.matrix(dense))
        return {f"{self.layer.name}.{key}": value for key, value in packed.items()}


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    max_shard_size: int | str = "5GB",
) -> Conversion:
    """Convert a checkpoint that compressed-tensors before 0.15 wrote sparse.

    Reads its formats `sparse-bitmask` and `sparse-24-bitmask`, which later versions can't. Weights
    keep their dtype and every bit but the sign of zeros. The linear layers that method "keep"
    would pack are packed, in the smallest format; all else is stored dense. The tokenizer and the
    other files are copied as they are, weights in other forms and hidden files left out.

    Args:
        source: the checkpoint's folder.
        target: folder; created if it isn't there. Appears complete or not at all.
        max_shard_size: of a safetensors file, as for `PreTrainedModel.save_pretrained`; no
            more than that and the layer at work is in memory.

    Raises:
        CheckpointError: the source is in another format, damaged, or of a model that this version
            of transformers doesn't know, or stores differently; names file and tensor.
        ConfigError: max_shard_size is no size.
        SaveError: writing failed; what was there before is as it was.
    """
    folder, limit = Path(source), _limit(max_shard_size)
    if folder.resolve() in (Path(target).resolve(), *Path(target).resolve().parents):
        raise SaveError(f"can't save to {str(target)!r}: it is in the source, pass another folder")
    config = _read_config(folder)
    structure = old_format(config, str(folder))
    files = weight_files(folder)
    parameters = read_parameters(files, structure)
    items = _plan(folder, empty_model(_clean(config), folder), parameters)

    def write(staging: str) -> None:
        _copy_others(folder, Path(staging))
        _write_config(config, Path(staging))
        _write_weights(items, Path(staging), limit)

    write_folder(target, write)
    layers = {item.layer.name: item.layer.format.label for item in items if item.layer}
    after = weight_files(Path(target))
    dense = sum(not (item.layer or isinstance(item.parameter, _Number)) for item in items)
    return Conversion(layers, dense, _size(files), _size(after))


def _limit(max_shard_size: int | str) -> int:
    try:
        return int(convert_file_size_to_int(max_shard_size))
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(
            f"max_shard_size={max_shard_size!r} is no size: pass bytes or a text like '5GB'"
        ) from None


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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json: it is no model's folder") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: it can't be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: it holds no object")
    return content


def _clean(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without a trace of how the weights were stored."""
    return {key: value for key, value in config.items() if key not in _CONFIG_KEYS}


def _plan(
    folder: Path, model: PreTrainedModel, parameters: Sequence[StoredParameter]
) -> list[_Item]:
    """Name every parameter, check what is stored of it, and choose its format."""
    left_dense = find_routers(model) | default_dense(model)
    named, split = _named(model, parameters)
    left_dense |= _take_apart(model, split)
    expected: dict[str, Tensor] = dict(model.state_dict())
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    chosen = select_targets(model, None, None, left_dense).targets
    targets = {f"{target.name}.weight": target for target in chosen}
    items: dict[str, _Item] = {}
    with progress_bar(len(named), "Checking") as bar:
        for name, parameter in named.items():
            bar.update()
            if name not in expected:
                raise parameter.origin.error(f"is of no parameter of {type(model).__name__}")
            if parameter.shape != tuple(expected[name].shape):
                raise parameter.origin.error(
                    f"is of a weight of shape {parameter.shape}, {type(model).__name__} has "
                    f"{tuple(expected[name].shape)} there"
                )
            items[name] = _item(name, parameter, targets.get(name))
    numbers = {f"{name}.{local}" for name in split for local in _projections(model, name)}
    there = items.keys() | numbers
    for name in expected:
        found = name in there or tied.get(name) in there
        if not found and not may_be_missing(model, name):
            raise CheckpointError(f"{folder}: no file has {name}")
    for name in split:
        _finish_experts(name, _projections(model, name), items, named)
    return [item for name, item in items.items() if tied.get(name) not in items]


def _named(
    model: PreTrainedModel, parameters: Sequence[StoredParameter]
) -> tuple[dict[str, Parameter], list[str]]:
    """The parameters by their names in memory, and the fused experts of which it has the layers."""
    rename = renaming(model, dict(model.state_dict()))
    found: dict[str, list[StoredParameter | None]] = {}
    split: dict[str, None] = {}
    for parameter in parameters:
        place = rename(parameter)
        if place is None and not is_needed(model, parameter.names[0]):
            continue
        if place is None:
            raise parameter.origin.error(f"is of no parameter of {type(model).__name__}")
        parts = found.setdefault(place.name, [None] * place.parts)
        if parts[place.part] is not None:
            raise parameter.origin.error(f"is a second {place.name}")
        parts[place.part] = parameter
        if place.experts is not None:
            split[place.experts] = None
    named: dict[str, Parameter] = {}
    for name, parts in found.items():
        there = [part for part in parts if part is not None]
        if len(there) < len(parts):
            raise there[0].origin.error(f"is a part of {name}, whose other part no file has")
        named[name] = there[0] if len(there) == 1 else MergedParameter(there, stacked=False)
    return named, list(split)


def _take_apart(model: PreTrainedModel, split: Sequence[str]) -> dict[str, str]:
    """Make layers of fused experts that the files have one by one; gives those that stay dense."""
    tied = tied_experts(model)
    for name in split:
        unfuse(model, model.get_submodule(name))
    return {
        layer: "its weight is tied"
        for name in tied.intersection(split)
        for layer, _ in model.get_submodule(name).named_modules(prefix=name)
    }


def _projections(model: PreTrainedModel, experts: str) -> dict[str, int]:
    """The names of the fused weights of experts that are layers now, with the number of experts."""
    module = model.get_submodule(experts)
    assert isinstance(module, SparseExperts)
    return {local: module.num_experts for local, _ in module.named_buffers(recurse=False)}


def _finish_experts(
    name: str,
    projections: Mapping[str, int],
    items: dict[str, _Item],
    named: Mapping[str, Parameter],
) -> None:
    """Add what `SparseExperts` has beside its layers; without a packed one they stay fused."""
    layers = {
        local: [f"{name}.{expert}.{local}.weight" for expert in range(number)]
        for local, number in projections.items()
    }
    packed = any(items[key].layer for keys in layers.values() for key in keys)
    for local, keys in layers.items():
        fused = f"{name}.{local}"
        if packed:
            items[fused] = _Item(fused, _Number(len(keys)), 8)
        else:
            whole = MergedParameter([named[key] for key in keys], stacked=True)
            for key in keys:
                del items[key]
            items[fused] = _Item(fused, whole, whole.dense_bytes)


def _item(name: str, parameter: Parameter, target: Target | None) -> _Item:
    """The parameter under its name, packed if it is a linear layer's weight and gets smaller."""
    if not parameter.sparse:
        return _Item(name, parameter, parameter.dense_bytes)
    dense = parameter.dense()  # checks it
    if target is not None:
        weight = target.axes.matrix(dense)
        fmt = choose_format(weight, Unstructured(0.0), "auto")
        if not isinstance(fmt, Dense):
            layer = PackedLayer(target.name, fmt, target.shape, target.axes)
            return _Item(name, parameter, parameter.bytes, layer)
    return _Item(name, parameter, parameter.dense_bytes)


def _copy_others(source: Path, staging: Path) -> None:
    """Copy what is neither weights nor config.json nor hidden."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        left = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if hidden or left or relative == Path("config.json") or not path.is_file():
            continue
        (staging / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, staging / relative)


def _write_config(config: Mapping[str, Any], staging: Path) -> None:
    described = _clean(config) | {"quantization_config": SparseConfig(method="keep").to_dict()}
    _write_json(staging / "config.json", described)


def _write_weights(items: Sequence[_Item], staging: Path, limit: int) -> None:
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


def _shards(items: Sequence[_Item], limit: int) -> list[list[_Item]]:
    """Cut into runs of at most `limit` bytes; an item that has more is a run of its own."""
    shards: list[list[_Item]] = [[]]
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


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)
