"""The triangular factor of a damped Hessian's inverse: what SparseGPT walks along."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import SolveError

# Damping is raised tenfold at most this often before a Hessian counts as unusable.
DAMP_STEPS = 4


# A triangular matrix of this many rows is inverted at once.
LEAF = 512


@dataclass(frozen=True)
class InverseFactor:
    """U, upper triangular with a positive diagonal, H^-1 = U'U after damping.

    Attributes:
        upper: U, fp32, shape (in, in).
        dead: inputs that were zero in all tokens, shape (in,).
        damping: the fraction of mean(diag H) that was added to the diagonal in the end.
    """

    upper: Float[Tensor, "in in"]
    dead: Tensor
    damping: float


def _factorise(hessian: Tensor, damp_percent: float) -> InverseFactor:
    """In place where it can be: some 20 bytes for each element of H at a time, beside H's own 4."""
    dead = hessian.diagonal() == 0
    mean = float(hessian.diagonal().double().where(~dead, 1.0).mean())
    for step in range(DAMP_STEPS):
        damping = damp_percent * 10**step
        damped = hessian.flip(0, 1).double()
        damped.diagonal()[dead.flip(0)] = 1.0
        damped.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if int(info) == 0:
            _invert(lower)
            upper = lower.float().flip(0, 1)
            if bool(torch.isfinite(upper).all()):
                return InverseFactor(upper, dead, damping)
        del lower
    raise SolveError(
        f"its Hessian is not positive definite, even with {damp_percent * 10 ** (DAMP_STEPS - 1)} "
        "of the mean diagonal added: use more or more varied calibration data, or a larger "
        "damp_percent"
    )


def _invert(lower: Tensor) -> None:
    """A lower triangular matrix becomes its inverse: by halves, nearly all of it in products."""
    size = len(lower)
    if size <= LEAF:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, last, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert(first)
    _invert(last)
    below.copy_((last @ (below @ first)).neg_())
