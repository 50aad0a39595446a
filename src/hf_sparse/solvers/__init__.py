"""Pruning methods. A new one is one file and one line here."""

from __future__ import annotations

from dataclasses import fields

from ..errors import ConfigError
from .base import Solution, Solver
from .keep import Keep
from .magnitude import Magnitude
from .sparsegpt import SparseGPT
from .wanda import Wanda

SOLVERS: dict[str, type[Solver]] = {cls.name: cls for cls in (SparseGPT, Wanda, Magnitude, Keep)}

__all__ = ["SOLVERS", "Solution", "Solver", "get_solver", "make_solver"]


def get_solver(method: object) -> type[Solver]:
    """The solver class registered under a name, or a ConfigError that lists the names."""
    if not isinstance(method, str) or method not in SOLVERS:
        raise ConfigError(f"method={method!r} does not exist: pass one of {', '.join(SOLVERS)}")
    return SOLVERS[method]


def make_solver(method: str, settings: object) -> Solver:
    """The solver with its fields from the attributes of the same name that `settings` has."""
    cls = get_solver(method)
    return cls(**{f.name: getattr(settings, f.name, f.default) for f in fields(cls)})  # type: ignore[arg-type]
