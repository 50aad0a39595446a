"""The triangular factor of a damped Hessian's inverse: what SparseGPT walks along."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .counting import all_finite
from .errors import SolveError

# Damping is raised tenfold at most this often before a Hessian counts as unusable.
DAMP_STEPS = 4
# A triangular matrix of this many rows is inverted at once.
LEAF = 512
# Rows or columns of a wide matrix that are copied at once.
STRIP = 512


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


def damped(hessian: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """A copy of H with H_jj = 1 for dead inputs, and then damping * mean(diag H) added."""
    matrix = hessian.to(dtype, copy=True)
    _damp(matrix.diagonal(), damping)
    return matrix


def _damp(diagonal: Tensor, damping: float) -> None:
    """What `damped` does to the diagonal, in place: a view of H, not a copy.

    torch sums a copy's elements, which stand side by side, in another order, so that the last bit
    of an fp32 mean can differ, and the weights that are saved with it.
    """
    diagonal[diagonal == 0] = 1.0
    diagonal.add_(damping * float(diagonal.mean()))


def _reversed(matrix: Tensor, out: Tensor) -> Tensor:
    """Write a matrix into another with the order of rows and columns reversed."""
    size = len(matrix)
    for start in range(0, size, STRIP):
        strip = matrix[start : start + STRIP]
        out[size - start - len(strip) : size - start] = strip.flip(0, 1)
    return out


def factorise(
    hessian: Float[Tensor, "in in"], damping: float, spend: bool = False
) -> InverseFactor:
    """The factor U of H^-1 = U'U (SparseGPT, sec. 3.2), found in fp64 without forming H^-1.

    With J the reversal of the order, J H J = L L' gives H = V V' for the upper triangular
    V = J L J, and U = V^-1. H is damped first, and ten times more as long as it is not positive
    definite. Takes some 12 bytes for each element of H at a time, beside H's own 4.

    Args:
        hessian: H.
        damping: of the mean of its diagonal.
        spend: U takes H's memory; 8 bytes for each element then.

    Raises:
        SolveError: H isn't positive definite even with 10^3 times the damping; H is as it was.
    """
    dead = hessian.diagonal() == 0
    for step in range(DAMP_STEPS):
        raised = damping * 10**step
        # Column by column in memory, as LAPACK has it: torch would copy another order.
        lower = _reversed(hessian, torch.empty_like(hessian, dtype=torch.float64)).mT
        _damp(lower.diagonal(), raised)
        info = torch.empty((), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0:
            _invert(lower)
            if all(all_finite(strip.float()) for strip in torch.split(lower.mT, STRIP)):
                upper = _reversed(lower, hessian if spend else torch.empty_like(hessian))
                return InverseFactor(upper, dead, raised)
        del lower
    raise SolveError(
        f"its Hessian is not positive definite, even with {damping * 10 ** (DAMP_STEPS - 1)} "
        "of the mean diagonal added: use more or more varied calibration data, or a larger "
        "damping"
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
    # Columns from the left: what is overwritten meets only zeros of `first` from then on.
    for start in range(0, half, STRIP):
        strip = slice(start, start + STRIP)
        below[:, strip] = (last @ (below[:, start:] @ first[start:, strip])).neg_()
