"""`SparsityCallback`: watches a model's sparsity pattern while it trains, and prunes on the way."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config.sparse_config import SparseConfig
from ..core.errors import TrainingError
from ..core.logging import get_logger
from ..layers import sparse_layers
from ..layers.default_dense import default_dense
from ..layers.select import Target, select_targets
from .gradual import GradualPruning, check_method
from .masks import Masks, stored_mask
from .schedule import Cubic

logger = get_logger(__name__)

SCHEDULES = ("cubic",)


class SparsityCallback(TrainerCallback):
    """Keeps a model exactly as sparse as it is, or prunes its dense layers step by step.

    At every save the pattern of each sparse layer, in memory and in the checkpoint on disk, is
    compared with the one at the start of training, and once more at the end; training stops with
    an error that names layer and numbers if it broke.

    With a schedule, dense layers are pruned while they train: masks are chosen every `frequency`
    steps, from nothing to the whole sparsity along a cubic curve (Zhu & Gupta 2017), and applied
    after each step of the optimiser. What is gone stays gone. In the end the zeros are exactly
    those of the pattern, and `hf_sparse.prune(model, SparseConfig(method="keep"))` packs them. A
    run that is resumed goes on where it was.

    Without one, the zeros of the dense layers that `targets` names are kept.

    Args:
        schedule: "cubic" to prune while training, None to watch only.
        start: step up to which nothing is pruned; a float up to 1 is a fraction of all steps.
        end: step, or fraction, at which the whole sparsity is reached. Default 0.8: the rest is
            there to recover.
        sparsity, pattern, modules_to_not_convert: as in `SparseConfig`.
        method: "magnitude", "wanda", or any registered method that needs no more than the norms of
            a layer's inputs and chooses no pattern. The norms are of what the layer has seen in
            training since masks were last chosen, padding included.
        frequency: steps between two choices.
        targets: regexes of the layers, as in `SparseConfig`.

    Raises:
        TrainingError: an argument is not one of these, or goes with a schedule only.
        ConfigError: what `SparseConfig` says to the others.
    """

    def __init__(
        self,
        schedule: str | None = None,
        start: float = 0.0,
        end: float = 0.8,
        sparsity: Any = None,
        pattern: str = "unstructured",
        method: str = "magnitude",
        frequency: int = 10,
        targets: Sequence[str] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
    ) -> None:
        if schedule not in (None, *SCHEDULES):
            raise TrainingError(f"schedule={schedule!r} is not known: pass 'cubic', or None")
        check_method(method)
        for name, step in {"start": start, "end": end}.items():
            if type(step) not in (int, float) or not math.isfinite(step):
                raise TrainingError(f"{name}={step!r} must be a step, or a fraction of all steps")
        if type(frequency) is not int or frequency < 1:
            raise TrainingError(f"frequency={frequency!r} must be a number of steps, 1 or more")
        if schedule is None and (sparsity is not None or pattern != "unstructured"):
            raise TrainingError("sparsity and pattern need a schedule: pass schedule='cubic'")
        self._schedule, self._span, self._frequency = schedule, (start, end), frequency
        self._config = SparseConfig(
            sparsity=sparsity,
            pattern=pattern,
            method=method,
            targets=targets,
            modules_to_not_convert=modules_to_not_convert,
        )
        self._masks = Masks()
        self._held: list[Target] = []
        self._pruning: GradualPruning | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the masks, or find out how far a resumed run has pruned."""
        model = kwargs["model"]
        if self._pruning is not None:
            self._pruning.stop_watching()
        self._masks, self._held, self._pruning = Masks(), [], None
        for name, layer in sparse_layers(model).items():
            self._masks[name] = stored_mask(layer.format, layer.packed, layer.shape)
        if self._schedule is not None:
            self._begin_pruning(model, state.global_step, state.max_steps)
        elif self._config.targets is not None:
            self._hold(model)
        elif not list(self._masks):
            raise TrainingError(
                f"{type(model).__name__} has no sparse layer to watch: pass schedule='cubic' to "
                "prune it while it trains, or targets= to keep the zeros of dense layers"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimiser's step: zeros again, and more of them if it is time."""
        self._apply_masks()
        if self._pruning is not None and self._pruning.cubic.due(state.global_step):
            self._held = self._pruning.choose(state.global_step, self._masks)
            self._apply_masks()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the model, and the checkpoint that was just written, with the masks."""
        self._masks.check_model(kwargs["model"])
        if args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self._masks.check_checkpoint(os.path.join(args.output_dir, name), kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the model once more."""
        if self._pruning is not None:
            self._end_pruning(state.global_step)
        self._masks.check_model(kwargs["model"])

    def _begin_pruning(self, model: nn.Module, step: int, steps: int) -> None:
        cubic = Cubic.over(steps, *self._span, self._frequency)
        self._pruning = GradualPruning(model, self._targets(model), self._config, cubic)
        reached = cubic.last_due(step)
        if step and reached is not None:
            self._held = self._pruning.recover(reached, self._masks)
            self._apply_masks()
        if step < cubic.end:
            self._pruning.watch_inputs()

    def _end_pruning(self, step: int) -> None:
        assert self._pruning is not None
        self._pruning.stop_watching()
        end = self._pruning.cubic.end
        if step < end:
            logger.warning(
                "training ended after step %d, pruning would have at step %d: the final sparsity "
                "is not reached",
                step,
                end,
            )

    def _hold(self, model: nn.Module) -> None:
        self._held = list(self._targets(model))
        for target in self._held:
            with target.weight() as weight:
                self._masks[target.name] = weight != 0

    def _targets(self, model: nn.Module) -> tuple[Target, ...]:
        config, dense = self._config, default_dense(model)
        chosen = select_targets(model, config.targets, config.modules_to_not_convert, dense)
        return chosen.targets

    @torch.no_grad()
    def _apply_masks(self) -> None:
        for target in self._held:
            weight = target.axes.matrix(target.module.weight)  # type: ignore[arg-type]
            weight.masked_fill_(~self._masks[target.name].to(weight.device), 0)
