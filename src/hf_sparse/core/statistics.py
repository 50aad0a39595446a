"""What a solver may know about a layer's inputs: the frozen result of calibration.

With X the (tokens, in) inputs of a layer, accumulated in fp32:

    column norms   c_j = sqrt(sum_t X_tj^2 / T)    Wanda (Sun et al. 2023, eq. 1)
    Hessian        H = X'X / T                     SparseGPT (Frantar & Alistarh 2023, sec. 3)

SparseGPT's own H is 2/n X'X with n sequences; a constant factor changes neither the mask nor the
update, since the damping is relative to the mean of the diagonal (only the 1 that stands for a
dead input in that mean does not scale with it). Layers that read the same
tensor (q/k/v, gate/up) share one `Statistics` and with it one factorisation.

Two things beyond the inputs themselves, when a method asks for them:

    cross moment   C = Xd'X / T       Xd: the same tokens' inputs in the dense model
    output metric  G = E[d d']        d: gradients of the model's loss in the layer's outputs
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from .counting import all_finite
from .errors import SolveError
from .inverse_factor import InverseFactor, damped, factorise
from .precision import full_precision


class Needs(enum.IntEnum):
    """What a solver asks for; each level includes those before it."""

    NOTHING = 0
    COLUMN_NORMS = 1
    HESSIAN = 2


@dataclass(frozen=True)
class Statistics:
    """Frozen summary of one input; shared by all layers that read it."""

    tokens: int
    sample: Float[Tensor, "rows in"]
    column_norms: Float[Tensor, " in"] | None = None
    hessian: Float[Tensor, "in in"] | None = None
    cross: Float[Tensor, "in in"] | None = None
    _factors: dict[float, InverseFactor] = field(default_factory=dict, repr=False, compare=False)
    _damped: dict[float, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def damped_hessian(self, damping: float) -> Float[Tensor, "in in"]:
        """H with H_jj = 1 for dead inputs and damping * mean(diag H) added; fp32, shared.

        Raises:
            SolveError: H is not finite.
        """
        if damping not in self._damped:
            assert self.hessian is not None, "the solver did not ask for the Hessian"
            matrix = damped(self.hessian, damping, self.hessian.dtype)
            if not all_finite(matrix):
                raise SolveError("its Hessian holds NaN or infinite values")
            self._damped[damping] = matrix
        return self._damped[damping]

    def inverse_factor(self, damping: float, spend: bool = False) -> InverseFactor:
        """The factor U of the damped H^-1 = U'U; computed once, see `factorise`.

        With `spend`, H is gone then: nobody else is going to ask for it.

        Raises:
            SolveError: H isn't positive definite even with 10^3 times the damping.
        """
        if damping not in self._factors:
            assert self.hessian is not None, "the solver did not ask for the Hessian"
            self._factors[damping] = factorise(self.hessian, damping, spend)
            if spend:
                object.__setattr__(self, "hessian", None)
        return self._factors[damping]

    @full_precision()
    def relative_error(
        self, before: Float[Tensor, "out in"], after: Float[Tensor, "out in"]
    ) -> float:
        """||X (W - W^)'|| / ||X W'|| in the Frobenius norm, on the sampled rows of X."""
        reference = (self.sample @ before.T).norm()
        difference = (self.sample @ (before - after).T).norm()
        return float(difference / reference) if reference > 0 else 0.0


def shrink(own: Statistics, shared: Statistics, share: float) -> Statistics:
    """Moments that are `share` parts of `own` and 1 - share of `shared`; the rest is `own`'s."""

    def mixed(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
        return None if mine is None or theirs is None else theirs.lerp(mine, share)

    norms = None
    if own.column_norms is not None and shared.column_norms is not None:
        norms = shared.column_norms.square().lerp(own.column_norms.square(), share).sqrt()
    hessian, cross = mixed(own.hessian, shared.hessian), mixed(own.cross, shared.cross)
    return Statistics(own.tokens, own.sample, norms, hessian, cross)


@dataclass(frozen=True)
class OutputMetric:
    """How much the model's loss feels an error in a layer's outputs: G = E[d d'].

    Attributes:
        diagonal: of G, exact, shape (out,).
        gram: G itself, or None if only a sketch of it was kept.
        sketch: F with E[F'F] = G, shape (rows, out), or None.
    """

    diagonal: Float[Tensor, " out"]
    gram: Float[Tensor, "out out"] | None = None
    sketch: Float[Tensor, "rows out"] | None = None

    def relative(self, damping: float) -> RelativeMetric:
        """G over the mean of its diagonal, with damping times the unit matrix added."""
        mean = self.diagonal.mean().clamp_min(torch.finfo(self.diagonal.dtype).tiny)
        if self.gram is not None:
            matrix = self.gram / mean
            matrix.diagonal().add_(damping)
            return RelativeMetric(matrix.diagonal(), matrix)
        assert self.sketch is not None
        factor = self.sketch / mean.sqrt()
        sketched = factor.square().sum(dim=0)
        missing = (self.diagonal / mean - sketched).clamp_min(0) + damping
        return RelativeMetric(sketched + missing, None, factor, missing)


@dataclass(frozen=True)
class RelativeMetric:
    """G as a refit multiplies by it: a matrix, or F'F and what the sketch F lacks of its diagonal.

    F'F is never formed: for layers with many outputs it would be most of the work and memory.
    """

    diagonal: Float[Tensor, " out"]
    matrix: Float[Tensor, "out out"] | None = None
    factor: Float[Tensor, "rows out"] | None = None
    missing: Float[Tensor, " out"] | None = None

    def times(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """G W."""
        if self.matrix is not None:
            return self.matrix @ weight
        assert self.factor is not None
        assert self.missing is not None
        product = self.factor.T @ (self.factor @ weight)
        return product.addcmul_(self.missing[:, None], weight)
