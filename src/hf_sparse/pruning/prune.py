"""Prune a model that is in memory: what stays dense by default, experts as layers, the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration.load import load_calibration
from ..calibration.tokenizers import load_tokenizer
from ..config.sparse_config import SparseConfig
from ..core.errors import ConfigError
from ..core.input_device import input_device
from ..core.processes import Processes
from ..core.torch_settings import own_settings
from ..kernels.cpu.wide import wide_products
from ..layers.default_dense import default_dense
from ..layers.experts import unfused_experts
from ..layers.head import speed_up_head
from ..layers.select import check_patterns
from .dense_measurements import DenseMeasurements
from .half_pruned import Progress, check_not_half_pruned, marked_if_broken_off
from .report import PruningReport
from .residence import Residence
from .run import run
from .wrappers import check_not_sharded, make_ordinary


def prune_in_place(
    model: nn.Module,
    config: SparseConfig,
    measurements: DenseMeasurements | None = None,
    residence: Residence | None = None,
    processes: Processes | None = None,
) -> PruningReport:
    """Prune any module tree; its pruned layers become `SparseLinear`s.

    Where several processes call it, each with the whole model, they share the samples and the
    layers, and end with the same model.

    Args:
        model: dense, and no wrapper; routers, and of a transformers model heads and tied weights
            stay dense unless the config asks for them.
        config: what to do.
        measurements: from `measurements_of`, for runs over copies of one model with the same data.
        residence: where its blocks are while they aren't at work; None for memory.
        processes: that call this together; None for those of the process group.

    Raises:
        ConfigError: the model is quantised or sparse already, or the config doesn't suit it.
        HfSparseError: see `core.errors`.
    """
    # Of a model in files nothing is changed, and a run over it can go on.
    marked = marked_if_broken_off(model) if residence is None else nullcontext(Progress())
    processes = processes or Processes.here()
    with own_settings(input_device(model)), marked as progress, processes.together():
        make_ordinary(model)
        with _marked_quantized(model), unfused_experts(model), wide_products(model):
            report = run(
                model,
                config,
                lambda: load_tokenizer(config.tokenizer, model),
                default_dense(model),
                progress,
                measurements,
                residence,
                processes,
            )
        speed_up_head(model)
    return report


def require_dense(model: nn.Module) -> None:
    """Raise a ConfigError if a model is quantised, sparse, half pruned or sharded already."""
    check_not_half_pruned(model)
    check_not_sharded(model)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if _is_unpacked_gguf(model, quantizer):
        return
    if quantizer is not None:
        raise ConfigError(
            f"{type(model).__name__} is quantised with "
            f"{quantizer.quantization_config.quant_method!r} already: call "
            "model.dequantize() first, or load the original"
        )


def _is_unpacked_gguf(model: nn.Module, quantizer: Any) -> bool:
    """Did the weights come from a GGUF file, and are dense now?

    Raises a ConfigError if they are in the file's blocks still.
    """
    config = getattr(quantizer, "quantization_config", None)
    if config is None or config.quant_method != "gguf":
        return False
    if all(parameter.is_floating_point() for parameter in model.parameters()) and not getattr(
        quantizer, "packed_modules", None
    ):
        return True
    raise ConfigError(
        f"{type(model).__name__} has its weights in the blocks of a GGUF file: load it with "
        "quantization_config=transformers.GgufConfig(dequantize=True)"
    )


def check_before_loading(model: nn.Module, config: SparseConfig) -> DenseMeasurements:
    """What can be wrong with the data or with names of layers, found before weights are loaded.

    Args:
        model: as its config describes it, on the meta device.
        config: what is to be done with it.

    Returns:
        The calibration data, for `prune_in_place`.

    Raises:
        HfSparseError: a regex matches no layer, or the data can't be used.
    """
    sparsities = config.sparsity if isinstance(config.sparsity, dict) else {}
    check_patterns(
        model, [*(config.targets or ()), *(config.modules_to_not_convert or ()), *sparsities]
    )
    with own_settings(torch.device("cpu")):
        return measurements_of(model, config)


def measurements_of(model: nn.Module, config: SparseConfig) -> DenseMeasurements:
    """The config's calibration data, tokenised for the model, and nothing measured yet."""
    return DenseMeasurements(
        load_calibration(model, config, lambda: load_tokenizer(config.tokenizer, model))
    )


@contextmanager
def _marked_quantized(model: nn.Module) -> Iterator[None]:
    """Some transformers models compute with `.weight` unless their config says so; if pruning
    fails it says what it said before."""
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    before = [getattr(config, "_is_quantized", False) for config in configs]
    for config in configs:
        config._is_quantized = True
    try:
        yield
    except BaseException:
        for config, value in zip(configs, before, strict=True):
            config._is_quantized = value
        raise
