"""The least-squares refit: the best values for a mask that is already chosen.

Given a target weight W and a mask M, the kept weights of V are moved by preconditioned conjugate
gradients (PCG; Jacobi: the diagonal) towards the minimum of

    inputs metric   tr((V - W) Hd (V - W)')        the error of the layer's outputs
    Fisher metric   tr(G (V - W) Hd (V - W)')      weighted by how much the loss feels it (K-FAC,
                                                   Martens & Grosse 2015)

with Hd the damped Hessian and G the output metric. The rows of the first are independent problems
that share Hd, so step sizes are per row; the second couples them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.shapes import Hessian, Mask, Weight
from ...core.statistics import OutputMetric

# Of the mean of diag G, added to it: directions the sampled gradients didn't show count, too.
OUTPUT_DAMPING = 0.02


def refit(start: Weight, target: Weight, mask: Mask, hessian: Hessian, steps: int) -> Weight:
    """PCG in the inputs metric.

    Args:
        start: zero outside of the mask.
        target: the dense weight to come close to.
        mask: True = kept.
        hessian: damped, positive definite.
        steps: of PCG; each is one (out, in, in) product.

    Returns:
        The refitted weight; a row that did not get better is the start's.
    """
    inverse = 1 / hessian.diagonal()
    weight = start.clone()
    residual = ((target - start) @ hessian) * mask
    direction = residual * inverse
    gain = (residual * direction).sum(dim=1, keepdim=True)
    image, scaled = torch.empty_like(weight), torch.empty_like(weight)
    for _ in range(steps):  # in place: fresh memory for every term takes as long as the product
        torch.mm(direction, hessian, out=image)
        step = _ratio(gain, torch.mul(direction, image, out=scaled).sum(dim=1, keepdim=True))
        weight += torch.mul(direction, step, out=scaled)
        residual -= image.mul_(mask).mul_(step)
        torch.mul(residual, inverse, out=scaled)
        before, gain = gain, torch.mul(residual, scaled, out=image).sum(dim=1, keepdim=True)
        direction.mul_(_ratio(gain, before)).add_(scaled)
    return keep_better(weight, start, target, hessian)


def refit_fisher(
    start: Weight,
    target: Weight,
    mask: Mask,
    hessian: Hessian,
    metric: OutputMetric,
    steps: int,
) -> Weight:
    """PCG in the Fisher metric; arguments as `refit`'s, and G.

    Start it from `refit`'s result: from further away the same steps lead to less.
    """
    felt = metric.relative(OUTPUT_DAMPING)
    inverse = 1 / torch.outer(felt.diagonal, hessian.diagonal())
    weight = start.clone()
    first = felt.times(target - start) @ hessian
    residual = first * mask
    direction = residual * inverse
    gain = (residual * direction).sum()
    image, scaled = torch.empty_like(weight), torch.empty_like(weight)
    for _ in range(steps):
        torch.mm(felt.times(direction), hessian, out=image)
        step = _ratio(gain, torch.mul(direction, image, out=scaled).sum())
        weight += torch.mul(direction, step, out=scaled)
        residual -= image.mul_(mask).mul_(step)
        torch.mul(residual, inverse, out=scaled)
        before, gain = gain, torch.mul(residual, scaled, out=image).sum()
        direction.mul_(_ratio(gain, before)).add_(scaled)
    old = ((target - start) * first).sum()
    difference = target - weight
    new = (difference * (felt.times(difference) @ hessian)).sum()
    return weight if bool(new < old) else start


def keep_better(weight: Weight, other: Weight, target: Weight, hessian: Hessian) -> Weight:
    """Each row of whichever of two weights comes closer to the target in the inputs metric."""
    losses = [_row_losses(candidate, target, hessian) for candidate in (weight, other)]
    return torch.where(losses[0] < losses[1], weight, other)


def _row_losses(weight: Tensor, target: Tensor, hessian: Tensor) -> Float[Tensor, "out 1"]:
    """The diagonal of (V - W) H (V - W)': what each row's outputs are off by, squared."""
    difference = weight - target
    return (difference * (difference @ hessian)).sum(dim=1, keepdim=True)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where there is nothing left to gain."""
    return torch.where(denominator > 0, numerator / denominator, 0)
