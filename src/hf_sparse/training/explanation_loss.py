"""`ExplanationLoss`: a loss for Trainer that keeps the reasons of a model's predictions right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..core.errors import EvaluationError, TrainingError
from ..core.untrusted_text import brief
from ..evaluation.attributions import embedding_of
from ..evaluation.data import predicts_next
from .predictions import chosen_positions, wide


class ExplanationLoss:
    """A `compute_loss_func`: the labels' cross entropy, and a penalty on wrong reasons.

    With `irrelevant` the penalty is that of Ross, Hughes & Doshi-Velez (2017, "Right for the Right
    Reasons", eq. 3): the mean over the samples of

        sum over tokens t of A_t |d/de_t sum_k log p_k|^2

    with A_t = 1 where a token is irrelevant, else 0, e_t its embedding and p_k the predicted
    probabilities; of models with a prediction for each position, summed over those with labels.

    With `dense` it keeps the reasons that the dense model has: with g the gradient of the labels'
    log probability in all embeddings of the batch, |g - g_dense|^2 / |g_dense|^2.

    Trainer calls it as `SparseTrainer(model, ..., compute_loss_func=ExplanationLoss(model, ...))`.
    It watches the model's forward passes until `remove`. In evaluation it is the cross entropy
    alone. A step takes two to three times as long as without.

    Args:
        model: what is trained, with `attn_implementation="eager"`: fused attention has no second
            derivatives. Inputs must be token ids.
        irrelevant: ids of tokens that predictions must not hang on; or a function from input ids
            (batch, tokens) to a mask of that shape, True where a token is irrelevant.
        dense: the model whose reasons are to be kept, on the device of training, eager too; put in
            evaluation mode. One of `irrelevant` and `dense` is needed.
        weight: of the penalty, above 0. Default 1.

    Raises:
        TrainingError: an argument is out of range, or a model's attention is fused.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        irrelevant: Iterable[int] | Callable[[Tensor], Tensor] | None = None,
        dense: nn.Module | None = None,
        weight: float = 1.0,
    ) -> None:
        if (irrelevant is None) == (dense is None):
            raise TrainingError(
                "ExplanationLoss needs irrelevant= (ids of tokens, or a function that masks them) "
                "or dense= (the model whose reasons are kept), one of the two"
            )
        if not (isinstance(weight, (int, float)) and 0 < weight < math.inf):
            raise TrainingError(f"weight={brief(weight)} must be a number above 0")
        self._mask = None if irrelevant is None else _mask_of(irrelevant)
        self._dense, self._weight = dense, weight
        for each in (model, dense):
            if each is not None:
                _check(each)
        self._causal = predicts_next(model)
        self._inputs: dict[str, Any] = {}
        self._embedded: Tensor | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._see_inputs, with_kwargs=True),
            embedding_of(model).register_forward_hook(self._see_embeddings),
        ]
        if dense is not None:
            dense.eval()

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Float[Tensor, ""]:
        """The loss of a pass, as Trainer asks for it."""
        if labels is None:
            raise TrainingError("ExplanationLoss compares with labels: the data have none")
        loss, count = self._cross_entropy(outputs.logits, labels)
        embedded, self._embedded = self._embedded, None
        if torch.is_grad_enabled() and count:
            if embedded is None:
                raise TrainingError(
                    "ExplanationLoss has seen no forward pass with gradients since the last loss: "
                    "make one for each model that is trained, and don't call `remove` before"
                )
            # Per sample or relative, and weighted as the batch's part of a step.
            loss = loss + self._weight * count * self._penalty(outputs.logits, labels, embedded)
        return loss / (count or 1 if num_items_in_batch is None else num_items_in_batch)

    def remove(self) -> None:
        """Watch the model no longer."""
        for hook in self._hooks:
            hook.remove()

    def _see_inputs(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._inputs = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
        self._inputs.pop("num_items_in_batch", None)
        if "input_ids" not in self._inputs:
            raise TrainingError("ExplanationLoss needs token ids: pass input_ids by name")

    def _see_embeddings(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            self._embedded = output
        return output

    def _chosen(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (predictions, classes) and their labels."""
        chosen = chosen_positions(logits, labels, None, self._causal)
        if chosen is None:
            return logits, labels
        if self._causal:
            labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        return logits[chosen], labels[chosen]

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """The sum over the predictions, and how many there are."""
        logits, labels = self._chosen(logits, labels)
        return F.cross_entropy(wide(logits), labels, reduction="sum"), len(labels)

    def _penalty(self, logits: Tensor, labels: Tensor, embedded: Tensor) -> Tensor:
        if self._mask is not None:
            found = wide(self._chosen(logits, labels)[0]).log_softmax(-1).sum()
            (gradient,) = torch.autograd.grad(found, embedded, create_graph=True)
            mask = self._mask(self._inputs["input_ids"])
            if mask.shape != gradient.shape[:-1]:
                raise TrainingError(
                    f"irrelevant gave a mask of shape {tuple(mask.shape)}, expected "
                    f"{tuple(gradient.shape[:-1])}, as the input ids"
                )
            return (wide(gradient).square().sum(-1) * mask).sum() / len(gradient)
        assert self._dense is not None
        (gradient,) = torch.autograd.grad(
            -self._cross_entropy(logits, labels)[0], embedded, create_graph=True
        )
        kept = wide(self._dense_gradient(labels))
        return (wide(gradient) - kept).square().sum() / kept.square().sum()

    def _dense_gradient(self, labels: Tensor) -> Tensor:
        """That of the dense model for the same inputs."""
        assert self._dense is not None
        embedded: list[Tensor] = []

        def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        hook = embedding_of(self._dense).register_forward_hook(watch)
        try:
            logits = self._dense(**self._inputs).logits
            found = -self._cross_entropy(logits, labels)[0]
            (gradient,) = torch.autograd.grad(found, embedded[:1])
        finally:
            hook.remove()
        return gradient


def _mask_of(irrelevant: Iterable[int] | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if callable(irrelevant):
        return irrelevant
    ids = list(irrelevant) if isinstance(irrelevant, Iterable) else [irrelevant]
    if not ids or not all(type(each) is int for each in ids):
        raise TrainingError(f"irrelevant={brief(irrelevant)} must be token ids or a function")
    return lambda input_ids: torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))


def _check(model: nn.Module) -> None:
    try:
        embedding_of(model)
    except EvaluationError as error:
        raise TrainingError(str(error)) from None
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if used is not None and used != "eager":
        raise TrainingError(
            f"{type(model).__name__} has attn_implementation={used!r}, whose gradients have none "
            'themselves: call model.set_attn_implementation("eager"), or load it with '
            'attn_implementation="eager" where that changes nothing'
        )
