"""Losses that pull a sparse model towards its dense teacher; the maths only.

KL divergence of the teacher's distribution from the student's at temperature T, times T^2, so
that its gradient keeps its size (Hinton et al. 2015, sec. 2). Hidden states: squared error over
the teacher's squared norm, layer by layer, so that no layer outweighs the others (SquareHead,
Kurtic et al. 2023, eq. 1), here the mean over the layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .predictions import wide


def kl_loss(
    student: Float[Tensor, "tokens classes"],
    teacher: Float[Tensor, "tokens classes"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Mean over the tokens, from logits; in fp32 or wider."""
    ours = F.log_softmax(wide(student) / temperature, dim=-1)
    theirs = F.log_softmax(wide(teacher) / temperature, dim=-1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def hidden_loss(
    student: Sequence[Float[Tensor, "tokens hidden"]],
    teacher: Sequence[Float[Tensor, "tokens hidden"]],
) -> Float[Tensor, ""]:
    """Mean over the layers of |s - t|^2 / |t|^2, in fp32 or wider."""
    pairs = [(wide(ours), wide(theirs)) for ours, theirs in zip(student, teacher, strict=True)]
    losses = [(ours - theirs).square().sum() / theirs.square().sum() for ours, theirs in pairs]
    return sum(losses[1:], losses[0]) / len(losses)
