"""Pruning methods. A new one is one file and one line here."""

from __future__ import annotations

from dataclasses import fields

from .adaprune import AdaPrune
from .admm import ADMM
from .alps import ALPS
from .base import Solution, Solver
from .keep import Keep
from .magnitude import Magnitude
from .obc import OBC
from .sparsegpt import SparseGPT
from .wanda import Wanda

SOLVERS: dict[str, type[Solver]] = {
    cls.name: cls for cls in (SparseGPT, ALPS, ADMM, Wanda, Magnitude, OBC, AdaPrune, Keep)
}

__all__ = ["SOLVERS", "Solution", "Solver", "make_solver"]


def make_solver(name: str, settings: object) -> Solver:
    """A registered solver, its fields taken from the attributes of the same name of `settings`."""
    cls = SOLVERS[name]
    return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})  # type: ignore[arg-type]
