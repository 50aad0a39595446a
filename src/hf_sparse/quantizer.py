"""The adapter between transformers' loading code and this package; no maths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, auto

from .calibration.attention import apply_attention, check_attention, learn, settle_attention
from .calibration.sources import check_source
from .checkpoint.attention_file import read_attention
from .checkpoint.commit import PAGE_FILE
from .checkpoint.headers import PackedLayer, read_layers
from .checkpoint.load import build_layers, finish_layers
from .checkpoint.save_id import check_single
from .checkpoint.state_dict import ValuesRenaming, sparse_state_dict
from .checkpoint.weight_files import GUARD, POINTER
from .config.arguments import ARGUMENTS
from .config.keys import QUANT_METHOD
from .config.sparse_config import SparseConfig
from .core.errors import CheckpointError, ConfigError
from .core.freed_memory import freed_memory_returned
from .core.logging import get_logger
from .core.model_argument import require_model
from .core.processes import Processes
from .core.unwrapped import unwrapped
from .evaluation import Evaluation
from .layers import sparse_layers
from .layers.activations import round_activations as layers_round_activations
from .layers.conv import empty_original_layer
from .layers.counts import num_parameters
from .layers.experts import SparseExperts, fuse
from .layers.head import restore_head, speed_up_head
from .layers.prefer import prefer as prefer_form
from .layers.replace import ModuleParents, unpack_linear
from .pruning.dense_measurements import DenseMeasurements
from .pruning.plain import make_plain, unmark
from .pruning.prune import check_before_loading, prune_in_place, require_dense
from .pruning.report import PruningReport
from .pruning.residence import Residence
from .pruning.saved_report import saved_report
from .publish.html import write_report
from .publish.save import install_saving, is_plain, remove_saving
from .training import peft_hooks

logger = get_logger(__name__)

auto.register_quantization_config(QUANT_METHOD)(SparseConfig)
# transformers has no call to say which configs have loading attributes.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (SparseConfig,)
peft_hooks.install()


def prune(model: nn.Module, config: SparseConfig) -> PruningReport:
    """Prune a model that is already loaded, in place.

    Its pruned linear layers become `SparseLinear`s. A transformers model afterwards saves, pushes
    and dequantizes like one that was pruned by `from_pretrained`, and keeps the report as
    `model.hf_quantizer.report`.

    Args:
        model: a transformers model, or any module tree with linear layers; of a `PeftModel` the
            base model is pruned and the adapters are left alone, and of a compiled or data-parallel
            wrapper what is inside.
        config: what to do.

    Returns:
        What was done to each layer; names are those of the model inside a wrapper.

    Raises:
        ConfigError: the model is quantised or sparse already, or the config doesn't suit it.
        HfSparseError: see `hf_sparse.core.errors`.
    """
    if not isinstance(config, SparseConfig):
        raise ConfigError(f"prune needs a SparseConfig, found {type(config).__name__}")
    require_model(model)
    model = unwrapped(model)
    require_dense(model)
    if isinstance(model, PreTrainedModel):
        report = SparseQuantizer(config, pre_quantized=False).prune(model)
    else:
        check_attention(model, config)
        report = prune_in_place(model, config)
    peft_hooks.settle_adapters(model)
    return report


def prefer(model: nn.Module, what: str) -> None:
    """Say what the sparse layers of a loaded model are to be on this machine.

    Their values stay what they are; products may differ in the last bits.

    Args:
        model: with sparse layers, on the device where it runs.
        what: "memory", packed wherever a kernel can multiply them; "speed", packed or dense,
            whichever is faster for a token by what was measured here; "auto", what a model is
            loaded with: packed, unless its layers as a whole are slower by more than an eighth for
            half the memory, and in proportion.

    Raises:
        ConfigError: `what` is none of these.
    """
    ARGUMENTS["prefer"].check("prefer", what)
    prefer_form(model, what)
    quantizer = getattr(unwrapped(model), "hf_quantizer", None)
    if isinstance(quantizer, SparseQuantizer):
        quantizer.quantization_config.prefer = what


def round_activations(model: nn.Module, to: str | None) -> None:
    """Say what the quantised layers of a loaded model may round their inputs to on a CPU.

    Args:
        model: with sparse layers.
        to: "int8", in blocks of at most 32 inputs, with products of bytes, which are much
            faster; None: nothing, what a model is loaded with unless its config says otherwise.
            Weights stay what they are. A warning says so if no layer can be multiplied that way.

    Raises:
        ConfigError: `to` is neither.
    """
    ARGUMENTS["activations"].check("activations", to)
    layers_round_activations(model, to)
    quantizer = getattr(unwrapped(model), "hf_quantizer", None)
    if isinstance(quantizer, SparseQuantizer):
        quantizer.quantization_config.activations = to
        prefer_form(model, quantizer.quantization_config.prefer)


@auto.register_quantizer(QUANT_METHOD)
class SparseQuantizer(HfQuantizer):
    """Prunes dense checkpoints after they are loaded; builds sparse layers for sparse ones.

    Attributes:
        report: what pruning did; of a model that was loaded sparse, the report that was saved
            with it; None if there is none.
        trains_values: `training.prepare_for_training` has made parameters of the kept values.
    """

    requires_calibration = False

    def __init__(self, quantization_config: SparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: SparseConfig = quantization_config
        self.report: PruningReport | None = None
        self.evaluation: Evaluation | None = None
        self.trains_values = False
        self._measurements: DenseMeasurements | None = None
        self._files: Sequence[str] = ()
        self._layers: dict[str, PackedLayer] = {}
        self._renamed: frozenset[str] = frozenset()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Before anything is downloaded: is what the method needs there?"""
        if not self.pre_quantized:
            Processes.here()  # the others learn of this one before it can fail
            self.quantization_config.check_data()
            check_source(self.quantization_config.dataset)

    def update_attn_implementation(self, config: Any) -> Any:
        """The last that transformers asks before it looks for files: the guard has done its work,
        they have their usual names; and what was passed as `attn_implementation` is known."""
        if getattr(config, POINTER, None) == GUARD:
            delattr(config, POINTER)
        settle_attention(self.quantization_config, config._attn_implementation, self.pre_quantized)
        return config

    update_tp_plan = update_attn_implementation  # what transformers asks last before 5.24

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.pre_quantized:
            self._measurements = check_before_loading(model, self.quantization_config)
            return
        if not checkpoint_files:
            raise CheckpointError(
                "a sparse model is loaded from its files; a state_dict alone doesn't tell the "
                "formats of its layers"
            )
        self._files = checkpoint_files
        described = read_layers(checkpoint_files)
        self.report = saved_report(Path(checkpoint_files[0]).parent)
        self._renamed = frozenset(described)
        self._layers = build_layers(model, described, dtype or torch.get_default_dtype())

    def get_weight_conversions(self) -> list[Any]:
        return [ValuesRenaming.of(self._renamed)] if self._renamed else []

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """A sparse checkpoint has in-memory names: a family's renamings would only garble them."""
        if self._renamed:
            return self.get_weight_conversions()
        converted: list[Any] = super().update_weight_conversions(weight_conversions, *args)
        return converted

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            activations = self.quantization_config.activations
            for layer in sparse_layers(model).values():
                layer.activations = activations
            finish_layers(model, self._layers)
            check_single(self._files)
            prefer_form(model, self.quantization_config.prefer)
            layers_round_activations(model, activations)
            speed_up_head(model)
            _install(model)
            apply_attention(model, self.quantization_config)
            read_attention(model, Path(self._files[0]).parent)
        else:
            self.prune(model)

    def prune(
        self,
        model: PreTrainedModel,
        residence: Residence | None = None,
        measurements: DenseMeasurements | None = None,
    ) -> PruningReport:
        """Prune a dense model and keep the report; the config then describes the data.

        A model that has only lost experts is an ordinary one still, and saved as such. What is
        passed is as of `prune_in_place`; `residence` may have the model's weights.
        """
        config, measurements = self.quantization_config, measurements or self._measurements
        self._measurements = None
        check_attention(model, config)
        self.report = prune_in_place(model, self.quantization_config, measurements, residence)
        if self.report.data is not None:
            self.quantization_config = self.quantization_config.replaced(dataset=self.report.data)
        if self.report.experts and not sparse_layers(model):
            make_plain(model)
        else:
            model.config.quantization_config = self.quantization_config
            model.is_quantized = True
            model.quantization_method = QUANT_METHOD
        model.hf_quantizer = self
        _install(model)
        apply_attention(model, config)
        learn(model, config)
        return self.report

    def dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """Make a model dense, each layer in the dtype that it has: the config's, which transformers
        would take, is the one in which the model was loaded."""
        for experts in [m for m in model.modules() if isinstance(m, SparseExperts)]:
            fuse(model, experts, dtype)
        parents = ModuleParents(model)
        with freed_memory_returned():
            for name, sparse in sparse_layers(model).items():
                empty, held = empty_original_layer(sparse), dtype or sparse.weight_dtype
                parents.replace(sparse, unpack_linear(sparse, empty, held))
                logger.debug("%s is dense again", name)
        restore_head(model)
        unmark(model)
        remove_saving(model)
        model.__dict__.pop("num_parameters", None)
        self.remove_quantization_config(model)
        return model

    def write_page(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the report as HTML into a folder, if there is a report."""
        if self.report is not None:
            write_report(self.report, folder / PAGE_FILE, masks=model, evaluation=self.evaluation)

    def get_state_dict_and_metadata(
        self, model: nn.Module
    ) -> tuple[dict[str, Any] | None, dict[str, str]]:
        return (None, {}) if is_plain(model) else sparse_state_dict(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Does Trainer take the model without an adapter?"""
        return self.trains_values

    @property
    def is_compileable(self) -> bool:
        return True


def _install(model: PreTrainedModel) -> None:
    """What a sparse model does otherwise than its class: saving, and counting parameters."""
    install_saving(model)
    model.num_parameters = partial(num_parameters, model)  # type: ignore[method-assign]
