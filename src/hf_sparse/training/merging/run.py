"""merge_adapter: an adapted sparse model -> each layer's weight with its adapter -> values on the
layer's pattern -> the sparse model.

The modules of the model stay where they are until the last layer is solved and the outputs are
compared: until then merged layers stand in for the adapted ones at their calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.batches import Batch
from ...calibration.layer_statistics import Observed
from ...calibration.load import load_calibration
from ...calibration.stage_walk import walk_stages
from ...calibration.tokenizers import load_tokenizer
from ...config.sparse_config import SparseConfig
from ...core.errors import AdapterError, ConfigError, SolveError
from ...core.evaluation_mode import evaluation_mode
from ...core.input_device import input_device
from ...core.logging import get_logger, progress_bar
from ...core.renamed import renamed_arguments
from ...core.torch_settings import own_settings
from ...layers import SparseLinear
from ...layers.blocks import find_blocks
from ...layers.replace import ModuleParents, inherit
from ...solvers import Solution
from ...solvers.layer_solver import dense_target
from .adapted import Adapted, check_mergeable, find_adapted, merged_layer, stand_in, step_back
from .compare import compare
from .report import LayerMerge, MergeReport
from .values import values_on_pattern

logger = get_logger(__name__)

POLICIES = ("masked", "resolve")
NEVER_CALLED = "the model never called it on the data: masked"


@renamed_arguments(damp_percent="damping")
def merge_adapter(
    model: Any,
    policy: str = "masked",
    *,
    dataset: Any = None,
    tokenizer: Any = None,
    num_samples: int = 128,
    seq_len: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    damping: float = 0.01,
    refit: int = 20,
) -> Any:
    """Merge the active adapters into a sparse model, which keeps its pattern to the last weight.

    Each layer's weight with its adapters is what PEFT's own merging gives, of any kind of adapter
    that it can merge. "masked" takes its values where the sparse weight has some; "resolve" finds
    the values there that come closest to it in the layer's outputs, block by block on the
    calibration data. Layers that are quantised are rounded to a grid of their kind again. What
    else the adapter changed (layers that are dense, `modules_to_save`) is merged by PEFT.

    Args:
        model: a `peft.PeftModel` over a sparse model; used up, as by PEFT's `merge_and_unload`.
            Its active adapters are merged; choose them with its `set_adapter`.
        policy: "masked" or "resolve".
        dataset: calibration data, as `SparseConfig.dataset`. "resolve" needs them; with "masked"
            they serve to measure alone.
        tokenizer, num_samples, seq_len, batch_size, seed: as `SparseConfig`'s.
        damping: added to the Hessian, as `SparseConfig.damping`.
        refit: steps of the least-squares refit of "resolve". Default 20.

    Returns:
        The sparse base model without adapters; how far it is from the unmerged one is in its
        `merge_report`, a `MergeReport`.

    Raises:
        ConfigError: an argument is wrong, or "resolve" has no data.
        AdapterError: the model has no adapter that can be merged; says why.
        CalibrationError: the data are unusable.
        SolveError: a layer can't be solved. On any error the model is as it was.
    """
    started = time.perf_counter()
    config = _config(policy, dataset, damping, refit, tokenizer=tokenizer,
        num_samples=num_samples, seq_len=seq_len, batch_size=batch_size, seed=seed)  # fmt: skip
    adapted = find_adapted(model)
    adapters = tuple(model.base_model.active_adapters)
    base = model.get_base_model()
    data = load_calibration(base, config, lambda: load_tokenizer(config.tokenizer, base))
    batches = data.batches if data else ()
    merge = _Merge(base, adapted, config)
    with evaluation_mode(base), own_settings(input_device(base)):
        try:
            layers = merge.solve(batches)
            fidelity = compare(base, merge.unmerged, batches) if batches else None
            merged = merge.finish(model)
        finally:
            merge.step_back()
    record = data.record if data else None
    seconds = time.perf_counter() - started
    report = MergeReport(policy, adapters, tuple(layers), fidelity, record, seconds)
    merged.merge_report = report
    logger.info("%s", report.summary())
    return merged


def _config(policy: str, dataset: Any, damp: float, refit: int, **data: Any) -> SparseConfig:
    """The settings as a config that has checked them; its refit is 0 for "masked"."""
    if policy not in POLICIES:
        raise ConfigError(
            f"policy={policy!r} is not known: pass {' or '.join(map(repr, POLICIES))}"
        )
    if policy == "masked":
        return SparseConfig(method="wanda", dataset=dataset, damping=damp, **data)
    if dataset is None:
        raise ConfigError(
            "policy='resolve' needs calibration data: pass dataset= a Hub id, the path of a text, "
            "JSON, csv or parquet file, or a list of strings, token ids or dicts; or "
            "policy='masked'"
        )
    if refit < 1:
        raise ConfigError(f"refit={refit} must be at least 1: without steps pass policy='masked'")
    return SparseConfig(
        method="sparsegpt", refit=refit, target="dense", dataset=dataset, damping=damp, **data
    )


class _Merge:
    """One run of `merge_adapter`."""

    def __init__(self, base: nn.Module, adapted: Adapted, config: SparseConfig) -> None:
        self._base, self._adapted, self._config = base, adapted, config
        self._merged: dict[nn.Module, SparseLinear] = {}
        self._layers: list[LayerMerge] = []

    @torch.no_grad()
    def solve(self, batches: Sequence[Batch]) -> list[LayerMerge]:
        """Solve all layers, which from then on stand in for the adapted ones."""
        for name, tuner in self._adapted.others.items():
            check_mergeable(name, tuner)
        with progress_bar(len(self._adapted.sparse), "Merging") as bar:
            self._walk(batches, bar)
            for name in self._adapted.sparse:
                if self._module(name) not in self._merged:
                    self._solve(name, None, (NEVER_CALLED,) if batches else ())
                    bar.update()
        return self._layers

    def _walk(self, batches: Sequence[Batch], bar: Any) -> None:
        """Solve the layers that the model calls on the data, block by block."""
        if not batches:
            return
        blocks = find_blocks(self._base, list(self._adapted.sparse), self._config.blocks)
        walk = walk_stages(self._base, blocks, batches, self._config, self.unmerged)
        with closing(walk):
            for found in (stage for _, stages in walk for stage in stages):
                for name in list(found):
                    self._solve(name, found.pop(name))
                    bar.update()

    def _module(self, name: str) -> nn.Module:
        module: Any = self._adapted.sparse[name]
        return module  # type: ignore[no-any-return]

    def _solve(self, name: str, observed: Observed | None, notes: tuple[str, ...] = ()) -> None:
        """Find a layer's merged weight, and let it stand in for the adapted layer."""
        tuner: Any = self._adapted.sparse[name]
        sparse: SparseLinear = tuner.get_base_layer()
        goal = merged_layer(name, tuner)
        if goal is None:
            self._merged[tuner] = sparse
            stand_in(tuner, sparse)
            return
        whole, low_rank = goal.weight.float(), sparse.low_rank
        beside = low_rank.to(torch.float32).product() if low_rank else torch.zeros(())
        try:
            solution = self._values(sparse, whole, beside, observed)
        except SolveError as error:
            raise SolveError(f"layer {name}: {error}") from None
        if not bool(torch.isfinite(solution.weight).all()):
            raise AdapterError(f"layer {name}: its merged weight overflows {sparse.weight_dtype}")
        self._merged[tuner] = _layer(sparse, solution, goal.bias)
        stand_in(tuner, self._merged[tuner])
        notes += (observed.note,) if observed and observed.note else ()
        statistics = observed.statistics if observed else None
        after = solution.weight.float() + beside
        zeros = int((~solution.mask).sum())
        self._layers.append(
            LayerMerge(
                name=name,
                zeros=zeros,
                sparsity=zeros / after.numel(),
                weight_error=_relative(after - whole, whole),
                output_error=statistics.relative_error(whole, after) if statistics else None,
                tokens=statistics.tokens if statistics else None,
                notes=notes,
            )
        )

    def _values(
        self, sparse: SparseLinear, whole: Tensor, beside: Tensor, observed: Observed | None
    ) -> Solution:
        """The packed part of a layer whose weight is to be `whole`, low-rank part included."""
        wanted, hessian, damp = whole, None, self._config.damping
        if observed is not None and self._config.refit:
            hessian = observed.statistics.damped_hessian(damp)
            wanted = dense_target(whole, observed.statistics, damp, observed.residual)
        mask, dtype = sparse.sparse_weight != 0, sparse.weight_dtype
        steps = self._config.refit
        return values_on_pattern(wanted - beside, mask, sparse.format, dtype, hessian, steps)

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """The model with its adapters, as it was."""
        self.step_back()
        try:
            yield
        finally:
            for tuner, layer in self._merged.items():
                stand_in(tuner, layer)

    def step_back(self) -> None:
        """Leave all adapted layers as they were."""
        for tuner in self._merged:
            step_back(tuner)

    def finish(self, model: Any) -> Any:
        """Put the merged layers in their places for good, and have PEFT merge the rest."""
        parents = ModuleParents(self._base)
        for tuner, layer in self._merged.items():
            parents.put(tuner, layer)
        try:
            return model.merge_and_unload(safe_merge=True)
        except BaseException:
            for tuner, layer in self._merged.items():
                parents.put(layer, tuner)
            raise


def _layer(sparse: SparseLinear, solution: Solution, bias: Tensor | None) -> SparseLinear:
    """A layer like a sparse one, held as that is, with other values, and bias if it has one."""
    own = sparse.bias
    if own is not None and bias is not None and not torch.equal(own, bias):
        own = nn.Parameter(bias, requires_grad=own.requires_grad)
    merged = type(sparse)(
        sparse.format,
        sparse.format.pack(solution.quantized or solution.weight),
        sparse.shape,
        sparse.weight_dtype,
        own,
        sparse.axes,
        sparse.low_rank,
        sparse.threshold,
    )
    inherit(sparse, merged)
    merged.form, merged.activations = sparse.form, sparse.activations
    merged.resolve()
    return merged


def _relative(difference: Tensor, whole: Tensor) -> float:
    size = float(whole.norm())
    return float(difference.norm()) / size if size else 0.0
