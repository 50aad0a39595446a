"""What a prediction hangs on: gradients of its log probability in the input embeddings."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..core.errors import EvaluationError
from .data import predicts_next


def embedding_of(model: nn.Module) -> nn.Module:
    """What makes a model's input embeddings of token ids; an encoder-decoder's encoder has its own.

    Raises:
        EvaluationError: the model has none.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        find = model.get_encoder().get_input_embeddings  # type: ignore[operator]
    else:
        find = getattr(model, "get_input_embeddings", None)
    try:
        embedding = None if find is None else find()
    except NotImplementedError:
        embedding = None
    if not isinstance(embedding, nn.Module):
        raise EvaluationError(
            f"{type(model).__name__} has no input embeddings that gradients could be taken in"
        )
    return embedding


def log_probabilities(
    logits: Float[Tensor, "batch *tokens classes"], last: Int[Tensor, " batch"]
) -> Float[Tensor, "batch classes"]:
    """Each sample's log probabilities, in fp32: of its class, or of what follows its last token."""
    if logits.ndim == 3:
        rows = torch.arange(len(logits), device=logits.device)
        logits = logits[rows, last.to(logits.device)]
    return logits.float().log_softmax(-1)


def attributions(
    model: nn.Module,
    batch: Batch,
    last: Int[Tensor, " batch"],
    target: Int[Tensor, " batch"] | None = None,
    times_input: bool = True,
) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch classes"]]:
    """Each token's part in the log probability of a target, in fp32; and all log probabilities.

    The gradient g in the token's embedding e: g'e, its first-order share of the log probability
    (gradient times input), or without the input |g|, how much it hangs on the token.

    Args:
        model: in evaluation mode.
        batch: inputs, where the model is.
        last: index of each sample's last token.
        target: the class or token asked about; None: what the model itself predicts.
        times_input: g'e, else |g|.

    Raises:
        EvaluationError: the model predicts no class and no next token, or not that target; or what
            it computes is no number.
    """
    embedded: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = embedding_of(model).register_forward_hook(watch)
    try:
        with torch.enable_grad():
            logits = getattr(model(**batch), "logits", None)
            if not isinstance(logits, Tensor):
                raise EvaluationError(f"{type(model).__name__} has no logits: it predicts nothing")
            if not embedded or (logits.ndim == 3 and not predicts_next(model)):
                raise EvaluationError(
                    f"{type(model).__name__} predicts neither a class nor the next token of its "
                    "inputs: pass a causal language model or a classifier of token ids"
                )
            found = log_probabilities(logits, last)
            wanted = found.argmax(-1) if target is None else target.to(found.device)
            if int(wanted.max()) >= found.shape[1]:
                raise EvaluationError(
                    f"{type(model).__name__} has {found.shape[1]} classes, {int(wanted.max())} is "
                    "none of them"
                )
            chosen = found.gather(1, wanted.unsqueeze(1)).sum()
            (gradient,) = torch.autograd.grad(chosen, embedded[:1])
    finally:
        hook.remove()
    if found.isnan().any() or not gradient.isfinite().all():
        raise EvaluationError(
            f"the predictions of {type(model).__name__} in {logits.dtype}, or their gradients, are "
            "NaN or infinite for these data: load it with dtype=torch.float32"
        )
    gradient = gradient.float()
    if not times_input:
        return gradient.norm(dim=-1), found.detach()
    return (gradient * embedded[0].detach().float()).sum(-1), found.detach()


def rank_correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Spearman's: Pearson's of the ranks, of which equal values share the mean. 1 if both rank all
    alike, 0 if only one of them does."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    sizes = ranks.norm(dim=1)
    if not sizes.all():
        return float(not sizes.any())
    return float(ranks[0] @ ranks[1] / (sizes[0] * sizes[1]))


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last: Tensor = counts.cumsum(0)
    ranks: Tensor = (last - (counts - 1) / 2).double()
    return ranks[place]
