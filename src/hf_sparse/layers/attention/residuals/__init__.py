"""What stands for the pairs that no selector has picked, one file each."""

from __future__ import annotations

from ....core.registry import Registry
from ..base import Residual
from .centroids import CentroidResidual
from .favor import FavorResidual
from .nothing import NoResidual

RESIDUALS: Registry[Residual] = Registry(
    "residual",
    Residual,  # type: ignore[type-abstract]
    (NoResidual, CentroidResidual, FavorResidual),
)
