"""The best low-rank complement of a sparse weight, in the metric of the layer's inputs.

For R = W - S, what the sparse part lacks, and H = C C', the matrix L of rank r that minimises

    tr((R - L) H (R - L)') = ||(R - L) C||^2

has L C = U U' R C (Eckart & Young 1936), with U the first r left singular vectors of R C. So L is
the projection U U' R, and U are eigenvectors of R H R': no factor of H is needed, which only has
to be positive semidefinite. If there are more outputs than inputs, R = Q R~ with orthonormal Q
leads to the smaller problem R~ H R~'.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.low_rank import LowRank


def fit_low_rank(
    residual: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], rank: int
) -> LowRank:
    """The best B A of a given rank; one eigendecomposition of the smaller side, in fp64.

    Args:
        residual: R, fp32.
        hessian: H; damped if all of R is to count.
        rank: r, 1 to the smaller side of R.

    Returns:
        B and A, fp32, rows of A and columns of B of equal norms.
    """
    out, columns = residual.shape
    core, basis = residual.double(), None
    if out > columns:
        basis, core = torch.linalg.qr(core)
    _, vectors = torch.linalg.eigh(core @ hessian.double() @ core.T)
    up = vectors[:, -rank:]
    down = up.T @ core
    if basis is not None:
        up = basis @ up
    # The columns of `up` have norm 1: half of each component's size, in logarithms, goes there.
    size = down.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    b, a = (up * size).float(), (down / size[:, None]).float()
    return LowRank(b.contiguous(), a.contiguous())  # LAPACK's are column after column


def error_size(
    difference: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]
) -> Float[Tensor, ""]:
    """tr(E H E') of a difference of weights E: what the outputs are off by, squared."""
    return (difference * (difference @ hessian)).sum(dtype=torch.float64)
