"""Pruning methods. A new one is one file and one line here."""

from __future__ import annotations

from dataclasses import fields

from ..core.errors import RegistrationError
from ..core.registry import Registry, check_frozen
from ..core.statistics import Needs
from .adaprune import AdaPrune
from .admm import ADMM
from .alps import ALPS
from .base import Solution, Solver
from .keep import Keep
from .magnitude import Magnitude
from .obc import OBC
from .sparsegpt import SparseGPT
from .wanda import Wanda


def _check_solver(cls: type[Solver]) -> None:
    """What a run reads of the class before there is an instance."""
    check_frozen(cls)
    for attribute, kind in {"needs": Needs, "chooses_pattern": bool}.items():
        found = getattr(cls, attribute, None)
        if not isinstance(found, kind):
            raise RegistrationError(
                f"{cls.__name__}.{attribute} is {found!r}: set it to a {kind.__name__}"
            )


SOLVERS: Registry[Solver] = Registry(
    "method",
    Solver,  # type: ignore[type-abstract]
    (SparseGPT, ALPS, ADMM, Wanda, Magnitude, OBC, AdaPrune, Keep),
    _check_solver,
)

__all__ = ["SOLVERS", "Solution", "Solver", "make_solver"]


def make_solver(name: str, settings: object) -> Solver:
    """A registered solver, its fields taken from the attributes of the same name of `settings`."""
    cls = SOLVERS[name]
    return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})  # type: ignore[arg-type]
