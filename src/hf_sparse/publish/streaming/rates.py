"""How fast some hardware does what a run consists of: given, or measured here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear

from ...config.sparse_config import SparseConfig
from ...core.inverse_factor import factorise
from ...core.precision import full_precision
from ...core.processes import ALONE
from ...core.statistics import Needs
from ...pruning.prune import prune_in_place
from .source import no_bars

# Of what is measured: large enough for full speed, small enough for some seconds in all.
SMALLEST, LARGEST, TOKENS = 64, 2048, 256
SECONDS = 1.0


@dataclass(frozen=True)
class Rates:
    """Of some hardware, all of it that is to be used together.

    Attributes:
        forward: floating-point operations a second of products in the model's dtype.
        single: of products in fp32, for Hessians and solving.
        double: of a Hessian's factorisation in fp64.
        weights: a second that are solved and packed, beside the products.
        disk: bytes a second, read or written.
        call: seconds that a call of a block takes beside its products.
        start: seconds that a run takes to begin and end.
    """

    forward: float
    single: float
    double: float
    weights: float
    disk: float = 1e9
    call: float = 1.2e-3
    start: float = 0.35


@torch.no_grad()
def measure_rates(config: SparseConfig, dtype: torch.dtype, side: int) -> Rates:
    """This machine's CPU, measured for some seconds with the config's own method.

    Args:
        config: what is to be done.
        dtype: of the model.
        side: inputs and outputs that a layer has, about; a smaller one of a large model is taken.
    """
    side = min(max(side, SMALLEST), LARGEST)
    x, weight = torch.randn(TOKENS, side), torch.randn(side, side)
    low, low_weight = x.to(dtype), weight.to(dtype)
    products = 2 * TOKENS * side * side
    with full_precision():
        single = products / _time(lambda: x @ weight)
    double = side**3 / _time(lambda: factorise(torch.eye(side), 0.01))
    forward = products / _time(lambda: linear(low, low_weight))
    data = [{"input": low}]
    toy = config.replaced(
        dataset=data if config.dataset is not None else None,
        targets=None,
        modules_to_not_convert=None,
        blocks=None,
        sparsity=config.sparsity if isinstance(config.sparsity, float) else None,
        allocation="uniform",
    )

    def prune() -> None:
        layer = nn.Sequential(nn.Linear(side, side, bias=False)).to(dtype)
        prune_in_place(layer, toy, processes=ALONE)

    with no_bars():
        prune()  # what is needed for the first time is loaded
        seconds = _time(prune)
    if config.needs is Needs.HESSIAN:
        seconds -= side**3 / double + (TOKENS * side**2 + side**3) / single
    return Rates(forward, single, double, side**2 / max(seconds, 1e-3))


def _time(work: Callable[[], object]) -> float:
    """Seconds that it takes, the shortest time of several."""
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        before = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - before)
    return best
