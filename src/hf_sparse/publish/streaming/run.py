"""`prune_checkpoint`: a dense checkpoint, block by block, to a sparse one."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from ...calibration.expected import ExpectedData
from ...calibration.tokenizers import find_processor
from ...checkpoint.folder import write_folder
from ...checkpoint.headers import read_layers
from ...checkpoint.load import build_layers
from ...checkpoint.state_dict import sparse_state_dict
from ...config.sparse_config import SparseConfig
from ...core.errors import ConfigError
from ...core.logging import get_logger
from ...core.processes import Processes
from ...core.sizes import read_size
from ...layers.counts import num_parameters
from ...pruning.prune import check_before_loading
from ...pruning.report import PruningReport
from ..card import is_own_card
from ..save import write_companions
from .estimate import Estimate, estimate_model
from .folders import as_folder, check_apart, check_room, folder_for, waiting_folder
from .ledger import Ledger
from .residence import Streamed
from .skeleton import Skeleton, open_checkpoint
from .source import SourceWeights
from .write_shards import write_shards

logger = get_logger(__name__)

# What the bytes of the result may depend on.
PACKAGES = ("hf_sparse", "torch", "transformers", "safetensors")


def prune_checkpoint(
    model_id_or_path: str | os.PathLike[str],
    config: SparseConfig,
    output_dir: str | os.PathLike[str],
    *,
    max_memory: int | str | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str = "50GB",
) -> PruningReport:
    """Prune a checkpoint from disk to disk, with one block at a time in memory.

    The result has the bytes of `from_pretrained(..., quantization_config=config)` followed by
    `save_pretrained`. Each block is read, pruned, packed and written, and then forgotten, on
    the CPU. Where several processes call it (torchrun, accelerate), each reads the block, with a
    share of the samples; the first writes, and all need the folders to be the same. None of the
    three folders may be in another one.

    Args:
        model_id_or_path: folder or Hub id of a dense model with safetensors files.
        config: what to do. Its method must do without gradients of the whole model.
        output_dir: folder for the result, with the tokenizer or processor; appears complete or not
            at all.
        max_memory: that the process may take: bytes, or a text with B, KB, MB, GB, TB (powers of
            1000) or KiB, MiB, GiB, TiB (of 1024). What doesn't fit is an error before the work.
            Activations wait in a file if that is what makes it fit. Default: all in memory but the
            weights.
        checkpoint_dir: a folder in which finished blocks are kept until the result is complete, so
            that a run that was broken off goes on from there. Default: a run begins anew.
        revision: branch, tag or commit of a Hub id.
        dtype: of the weights, as for `from_pretrained`. Default: the checkpoint's.
        max_shard_size: of a file of the result, in the same units.

    Returns:
        What was done to each layer.

    Raises:
        ConfigError: the config can't be used from disk to disk or in so little memory, the folders
            aren't apart, or the run in checkpoint_dir is another one; says what differs.
        CheckpointError: the model isn't stored in safetensors files that hold all of it.
        SaveError: the result, or a finished block, can't be written.
        ProcessError: another process was given something else, failed or is gone; with
            checkpoint_dir the run can go on, also in another number of processes.
        HfSparseError: see `hf_sparse.core.errors`.
    """
    processes = Processes.here()
    with ExitStack() as stack:
        stack.enter_context(processes.together())
        if not isinstance(config, SparseConfig):
            raise ConfigError(f"prune_checkpoint needs a SparseConfig, got {type(config).__name__}")
        _check_config(config)
        target = as_folder("output_dir", output_dir)
        kept_in = None if checkpoint_dir is None else as_folder("checkpoint_dir", checkpoint_dir)
        limit = None if max_memory is None else read_size("max_memory", max_memory)
        shard_size = read_size("max_shard_size", max_shard_size)
        resumable = kept_in is not None
        processes.check_same(
            {
                "the model": str(model_id_or_path),
                "output_dir": os.path.abspath(target),
                "checkpoint_dir": os.path.abspath(kept_in) if kept_in else None,
                "revision": revision,
                "dtype": str(dtype),
            }
        )
        skeleton = open_checkpoint(model_id_or_path, revision, dtype)
        check_apart(skeleton.folder, target, kept_in)
        model: Any = skeleton.model()
        measurements = check_before_loading(model, config)
        data = ExpectedData.in_data(measurements.data, model, config)
        needed = estimate_model(skeleton.twin, config, data, resumable)
        spill = _must_spill(needed, limit)
        check_room(needed, spill, target, kept_in)
        source = SourceWeights(skeleton.folder, skeleton.twin, skeleton.dtype)
        kept = stack.enter_context(folder_for(target, kept_in, processes))
        identity = processes.from_first(lambda: _identity(skeleton, source) if resumable else {})
        ledger = stack.enter_context(closing(Ledger(kept, identity, resumable, processes)))
        waiting = stack.enter_context(waiting_folder(kept, spill))
        residence = Streamed(source, ledger, waiting)
        quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
        model.hf_quantizer = quantizer
        report: PruningReport = quantizer.prune(model, residence, measurements)
        processor = find_processor(str(model_id_or_path), revision)

        def write(folder: str) -> None:
            _write_config(model, skeleton.dtype, Path(folder))
            _write_weights(skeleton, source, residence, ledger, Path(folder), shard_size)
            write_companions(model, Path(folder))
            if processor is not None:
                processor.save_pretrained(folder)

        processes.from_first(lambda: write_folder(target, write, keep=is_own_card))
        ledger.clear()
    return report


def _check_config(config: SparseConfig) -> None:
    config.check_data()
    if config.experts is not None:
        raise ConfigError(
            f"experts={config.experts} needs the whole model in memory, to score its experts: "
            "remove them with from_pretrained or prune first, and prune what that saved"
        )
    if config.needs_gradients:
        name = "metric" if config.metric == "fisher" else "allocation"
        raise ConfigError(
            f"{name}='fisher' takes gradients of the whole model, which from disk to disk is never "
            f"in memory: pass another {name}, or prune the model in memory"
        )


def _must_spill(needed: Estimate, limit: int | None) -> bool:
    """Tell what the run will take; must activations wait in a file for it to fit?

    Raises:
        ConfigError: it doesn't fit even so; says what is needed.
    """
    logger.info("%s", needed)
    allowed = psutil.virtual_memory().available if limit is None else limit
    if needed.peak_without_activations > allowed:
        parts = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in needed.memory.items())
        raise ConfigError(
            f"the run needs {needed.peak_without_activations / 1e9:.2f} GB of memory with "
            f"activations in a file, and {allowed / 1e9:.2f} GB are allowed or free ({parts}): "
            "pass a larger max_memory, or leave the widest layers dense, see modules_to_not_convert"
        )
    return limit is not None and needed.peak > limit


def _identity(skeleton: Skeleton, source: SourceWeights) -> dict[str, str]:
    """What the result depends on beside the config and the data."""
    files = {f"file {name}": digest for name, digest in source.digests().items()}
    versions = {f"version of {name}": version(name) for name in PACKAGES}
    threads = {"dtype": str(skeleton.dtype), "config.json": skeleton.digest()}
    return files | versions | threads


def _write_config(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    """What `save_pretrained` writes beside the weights."""
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _write_weights(
    skeleton: Skeleton,
    source: SourceWeights,
    residence: Streamed,
    ledger: Ledger,
    folder: Path,
    shard_size: int,
) -> None:
    """The result's files: finished blocks from theirs, everything else from the source's."""
    twin: Any = skeleton.twin
    described = {name: x for path in ledger.files for name, x in read_layers([path]).items()}
    build_layers(twin, described, skeleton.dtype)
    state, about = sparse_state_dict(twin)
    places: dict[str, Path] = {}
    for path in ledger.files:
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    ignored = set(twin._keys_to_ignore_on_save or ()) | _tied(twin)
    tensors = {name: tensor for name, tensor in state.items() if name not in ignored}
    read = partial(_read, places, residence)
    parameters = num_parameters(twin)
    write_shards(tensors, read, folder, {**about, "format": "pt"}, shard_size, parameters)


def _read(places: dict[str, Path], residence: Streamed, name: str) -> Tensor:
    if name not in places:
        return residence.outside(name)
    with safe_open(places[name], framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor.clone()


def _tied(twin: Any) -> set[str]:
    """Names of weights that are another one's, and saved under its name alone."""
    ties = getattr(twin, "all_tied_weights_keys", None) or {}
    state = twin.state_dict(keep_vars=True)
    return {name for name, other in ties.items() if state.get(name) is state.get(other)}
