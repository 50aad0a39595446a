"""`SparseTrainer`: transformers' Trainer for sparse models, with the dense model as a teacher."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Trainer

from ..core.errors import TrainingError
from ..evaluation.data import predicts_next
from ..layers import sparse_layers
from .distillation import hidden_loss, kl_loss
from .kept_values import prepare_for_training
from .predictions import chosen_positions


class SparseTrainer(Trainer):
    """Trains a sparse model's kept values, or an adapter on it, and distils from a teacher.

    A model with sparse layers and no adapter is prepared by `prepare_for_training`. In training
    the loss is L + kl_weight KL + hidden_weight H, where L is what `Trainer` computes, KL the
    divergence from the teacher's predictions and H the normalised squared error of the hidden
    states behind each block (`training.distillation`), both over the tokens that have labels.
    The evaluation loss is L alone.

    Args:
        model: as for `Trainer`; so are the other arguments.
        teacher: the dense model, on the device of training; put in evaluation mode. None: L alone.
        kl_weight: at least 0. Default 1.
        hidden_weight: at least 0; 0 for a teacher of other hidden sizes or depth. Default 1.
        temperature: of both distributions in KL, above 0. Default 1.

    Raises:
        TrainingError: the model can't be trained, or doesn't suit the teacher.
    """

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        teacher: nn.Module | None = None,
        kl_weight: float = 10.0,
        hidden_weight: float = 10.0,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.teacher = teacher
        self.kl_weight, self.hidden_weight = kl_weight, hidden_weight
        self.temperature = temperature
        if model is not None:
            self._take(model)
        super().__init__(model, *args, **kwargs)
        if teacher is not None:
            teacher.eval()

    def call_model_init(self, trial: Any = None) -> Any:
        """As in `Trainer`, for a model that `model_init` makes."""
        model = super().call_model_init(trial)
        self._take(model)
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As in `Trainer`; in training mode the teacher's terms are added."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = {key: value for key, value in inputs.items() if key != "labels"}
        labels = inputs.get("labels")
        if self.hidden_weight:
            inputs = {**inputs, "output_hidden_states": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        terms, tokens = self._teach(model, outputs, given, labels)
        if num_items_in_batch is not None and self._counts_items():
            # Trainer's own loss is a sum over the tokens of the whole step divided so, too.
            terms = terms * tokens / num_items_in_batch
            if self.args.average_tokens_across_devices:
                terms = terms * self.accelerator.num_processes
        loss = loss + terms
        return (loss, outputs) if return_outputs else loss

    def _take(self, model: nn.Module) -> None:
        """Check a model against the teacher and prepare it."""
        self._check_weights()
        if self.teacher is not None:
            check_teacher(model, self.teacher, self.hidden_weight > 0)
        adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
        if not adapted and sparse_layers(model):
            prepare_for_training(model)

    def _check_weights(self) -> None:
        for name in ("kl_weight", "hidden_weight"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise TrainingError(f"{name}={value!r} must be a number of at least 0")
        if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature < math.inf):
            raise TrainingError(f"temperature={self.temperature!r} must be a number above 0")
        if self.teacher is not None and not (self.kl_weight or self.hidden_weight):
            raise TrainingError(
                "kl_weight and hidden_weight are both 0, so the teacher has no effect: leave it out"
            )

    def _counts_items(self) -> bool:
        return bool(self.model_accepts_loss_kwargs or self.compute_loss_func is not None)

    def _teach(
        self, model: nn.Module, outputs: Any, inputs: dict[str, Any], labels: Tensor | None
    ) -> tuple[Tensor, int]:
        """The teacher's terms, weighted, per token; and the number of tokens."""
        assert self.teacher is not None
        where = next(self.teacher.parameters()).device
        if where != outputs.logits.device:
            device = outputs.logits.device
            raise TrainingError(
                f"the teacher is on {where}, the model on {device}: call "
                f"teacher.to({str(device)!r})"
            )
        with torch.no_grad():
            taught = self.teacher(**inputs, output_hidden_states=self.hidden_weight > 0)
        causal = predicts_next(self.accelerator.unwrap_model(model))
        chosen = chosen_positions(outputs.logits, labels, inputs.get("attention_mask"), causal)
        tokens = len(outputs.logits) if chosen is None else int(chosen.sum())
        terms = outputs.logits.new_zeros((), dtype=torch.float32)
        if not tokens:
            return terms, tokens
        if self.kl_weight:
            pair = outputs.logits, taught.logits
            ours, theirs = (logits if chosen is None else logits[chosen] for logits in pair)
            if ours.shape != theirs.shape:
                raise TrainingError(
                    f"the teacher's outputs have shape {tuple(taught.logits.shape)}, the model's "
                    f"{tuple(outputs.logits.shape)}: pass a teacher of the same classes"
                )
            terms = terms + self.kl_weight * kl_loss(ours, theirs, self.temperature)
        if self.hidden_weight:
            ours, theirs = _states(outputs, chosen), _states(taught, chosen)
            terms = terms + self.hidden_weight * hidden_loss(ours, theirs)
        return terms, tokens


def check_teacher(model: nn.Module, teacher: nn.Module, hidden_states: bool) -> None:
    """Raise a TrainingError that says what to do unless a model can learn from a teacher."""
    if teacher is model:
        raise TrainingError(
            "teacher and model are the same object: load the dense model a second time"
        )
    ours, theirs = _sizes(model), _sizes(teacher)
    if ours.get("vocab_size") != theirs.get("vocab_size"):
        raise TrainingError(
            f"the teacher's vocabulary has {theirs.get('vocab_size')} entries, the model's "
            f"{ours.get('vocab_size')}: pass a teacher with the same tokenizer"
        )
    for name in ("hidden_size", "num_hidden_layers") if hidden_states else ():
        if ours.get(name) != theirs.get(name):
            raise TrainingError(
                f"the teacher's {name} is {theirs.get(name)}, the model's {ours.get(name)}: pass "
                "hidden_weight=0 to learn from its predictions alone"
            )


def _sizes(model: nn.Module) -> dict[str, int]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    names = ("vocab_size", "hidden_size", "num_hidden_layers")
    return {name: getattr(text, name) for name in names if hasattr(text, name)}


def _states(outputs: Any, chosen: Tensor | None) -> list[Tensor]:
    """The hidden states behind each block, (tokens, hidden)."""
    states = getattr(outputs, "hidden_states", None)
    if not states:
        raise TrainingError(
            f"{type(outputs).__name__} has no hidden states to learn from: pass hidden_weight=0"
        )
    return [state.flatten(0, -2) if chosen is None else state[chosen] for state in states[1:]]
