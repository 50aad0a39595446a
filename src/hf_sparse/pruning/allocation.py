"""How a model's sparsity is spread over its layers.

Every rule is a curve per layer, t -> the layer's sparsity, that rises with one number t common to
all layers; t is found by bisection so that the zeros add up to the budget, and what is left by
rounding goes to the layers one by one. So the budget is met exactly.

    owl       s_l = p_l + t: blocks with more outliers keep more (Yin et al. 2024, sec. 3)
    fisher    s_l = the share of the layer's weights whose removal costs less than t
    explicit  the named layers have theirs, the others s_l = t

owl and fisher keep each layer within CLAMP of the mean sparsity, and never empty one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import ConfigError
from ..core.patterns import Unstructured

CLAMP = 0.15
# owl: an outlier is this many times the mean of |W_ij| ||X_j||; block sparsities span 2 OWL_SPAN.
OUTLIER = 5.0
OWL_SPAN = 0.08
# Points of a layer's cost curve.
POINTS = 1025
BISECTIONS = 100

Curve: TypeAlias = Callable[[float], float]


def meet_budget(
    curves: Mapping[str, Curve], sizes: Mapping[str, int], budget: int, low: float, high: float
) -> dict[str, int]:
    """Zeros per layer, exactly `budget` in all.

    Args:
        curves: by layer, rising.
        sizes: weights of each layer.
        budget: zeros in all layers together.
        low, high: between these t lies.

    Raises:
        ConfigError: no t gives that many zeros.
    """

    def zeros(t: float) -> dict[str, int]:
        return {name: Unstructured(curve(t)).zeros(sizes[name]) for name, curve in curves.items()}

    if not sum(zeros(low).values()) <= budget <= sum(zeros(high).values()):
        total = sum(sizes.values())
        fewest, largest = (sum(zeros(t).values()) / total for t in (low, high))
        raise ConfigError(
            f"the allocation can make between {fewest:.6g} and {largest:.6g} of the weights zero, "
            f"sparsity asks for {budget / total:.6g}: pass a sparsity between these, or name fewer "
            "layers in allocation"
        )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if sum(zeros(middle).values()) <= budget:
            low = middle
        else:
            high = middle
    found, most = zeros(low), zeros(high)
    rest = budget - sum(found.values())
    for name in found:
        more = min(rest, most[name] - found[name])
        found[name] += more
        rest -= more
    return found


def explicit_curves(fixed: Mapping[str, float | None]) -> dict[str, Curve]:
    """A layer's own sparsity, or t where it is None."""
    return {name: _constant(value) for name, value in fixed.items()}


def _constant(value: float | None) -> Curve:
    return (lambda t: t) if value is None else (lambda t: value)


def owl_curves(outliers: Mapping[str, float], sparsity: float) -> dict[str, Curve]:
    """From each layer's share of outliers (the same for the layers of a block)."""
    shares = torch.tensor(list(outliers.values()), dtype=torch.float64)
    spread = shares.max() - shares.min()
    scaled = (shares - shares.min()) / (spread if spread > 0 else 1) * 2 * OWL_SPAN
    preferred = sparsity + scaled.mean() - scaled
    pairs = zip(outliers, preferred.tolist(), strict=True)
    return {name: _clamped(lambda t, p=p: p + t, sparsity) for name, p in pairs}  # type: ignore[misc]


def fisher_curves(costs: Mapping[str, Tensor], sparsity: float) -> dict[str, Curve]:
    """From each layer's quantiles of the logarithm of its weights' costs (`cost_quantiles`)."""
    return {
        name: _clamped(lambda t, q=q: _share_below(q, t), sparsity)  # type: ignore[misc]
        for name, q in costs.items()
    }


def outlier_share(weight: Float[Tensor, "out in"], norms: Float[Tensor, " in"]) -> float:
    """The share of weights whose |W_ij| ||X_j|| is OUTLIER times its mean (Yin et al., eq. 1)."""
    scores = weight.abs() * norms
    return float((scores > OUTLIER * scores.mean()).double().mean())


def cost_quantiles(
    weight: Float[Tensor, "out in"],
    outputs: Float[Tensor, " out"],
    inverse_diagonal: Float[Tensor, " in"],
) -> Float[Tensor, " points"]:
    """log of g_i w_ij^2 / (H^-1)_jj, what removing w_ij costs the loss: POINTS quantiles.

    The OBS cost of a weight (Hassibi & Stork 1993, eq. 5), weighted by the output's Fisher
    information g_i.
    """
    costs = weight.square() / inverse_diagonal * outputs.unsqueeze(1)
    ordered = costs.flatten().clamp_min(torch.finfo(costs.dtype).tiny).log().sort().values
    index = torch.linspace(0, len(ordered) - 1, POINTS, device=ordered.device).long()
    return ordered[index].double().cpu()


def _share_below(quantiles: Tensor, t: float) -> float:
    """The share of a layer's costs below t, linear between quantiles."""
    right = int(torch.searchsorted(quantiles, t))
    if right in (0, len(quantiles)):
        return float(right > 0)
    left, here = float(quantiles[right - 1]), float(quantiles[right])
    return (right - 1 + (t - left) / (here - left)) / (len(quantiles) - 1)


def _clamped(curve: Curve, sparsity: float) -> Curve:
    low, high = max(0.0, sparsity - CLAMP), sparsity + min(CLAMP, (1 - sparsity) / 2)
    return lambda t: min(high, max(low, curve(t)))
