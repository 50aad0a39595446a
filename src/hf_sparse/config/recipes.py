"""Methods by name: which solver, and what goes with it.

A plain method is its solver, as its paper has it. A recipe is a name for settings, each of which
can also be said in `SparseConfig`; what is said there goes before what the recipe says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from ..core.errors import ConfigError, RegistrationError
from ..core.registry import unknown_name
from ..solvers import SOLVERS, Solver
from .arguments import ARGUMENTS


@dataclass(frozen=True)
class Recipe:
    """A solver and the defaults of the arguments that go with it.

    Attributes:
        solver: registered name of the method that chooses the mask.
        refit: steps of the least-squares refit of what is kept; 0 for none.
        target: "layer": each layer reproduces its own outputs; "dense": those of the dense model.
        metric: "inputs", or "fisher": refit again weighted by the loss's sensitivity.
        allocation: of unstructured sparsity over the layers.
        about: when to use it, in a sentence.
    """

    solver: str
    refit: int = 0
    target: str = "layer"
    metric: str = "inputs"
    allocation: str = "uniform"
    about: str = ""

    def settings(self) -> dict[str, Any]:
        """The arguments of `SparseConfig` that it sets, its solver as the method."""
        names = ("refit", "target", "metric", "allocation")
        own = {name: getattr(self, name) for name in names}
        changed = {name: value for name, value in own.items() if value != getattr(Recipe, name)}
        return {"method": self.solver, **changed}


RECIPES: Mapping[str, Recipe] = {
    "fast": Recipe("sparsegpt", refit=10, about="A first try, or a large model in little time."),
    "balanced": Recipe(
        "admm", refit=10, metric="fisher", allocation="fisher", about="The usual choice."
    ),
    "best": Recipe(
        "alps",
        refit=20,
        target="dense",
        metric="fisher",
        allocation="fisher",
        about="As good as it gets, in about four times the time of fast.",
    ),
}


def get_recipe(method: object) -> Recipe:
    """The recipe or plain method of a name, or a ConfigError that says which exist."""
    if isinstance(method, str):
        if method in RECIPES:
            return RECIPES[method]
        if method in SOLVERS:
            return Recipe(method)
    raise ConfigError(unknown_name("method", method, [*RECIPES, *SOLVERS]))


def get_solver(method: object) -> type[Solver]:
    """The solver class behind a method's name."""
    return SOLVERS[get_recipe(method).solver]


def register_solver(cls: type[Solver]) -> type[Solver]:
    """Make a pruning method of your own one like any other, under its `name`; a decorator.

    From then on `SparseConfig(method=...)`, `compare` and loading know it. Who loads a checkpoint
    that was made by it needs it registered too.

    Args:
        cls: a frozen dataclass that derives from `hf_sparse.solvers.Solver`; its fields are
            arguments of `SparseConfig`.

    Returns:
        The class.

    Raises:
        RegistrationError: it isn't that, lacks a method, or its name is taken.

    Example:
        >>> @hf_sparse.register_solver
        ... @dataclass(frozen=True)
        ... class Random(Solver):
        ...     name: ClassVar[str] = "random"
        ...     ...
    """
    if getattr(cls, "name", None) in RECIPES:
        raise RegistrationError(f"method {cls.name!r} is a recipe already: take another name")
    own: list[str] = [field.name for field in fields(cls)] if is_dataclass(cls) else []
    if unknown := [name for name in own if name not in ARGUMENTS]:
        raise RegistrationError(
            f"{cls.__name__} has a field {unknown[0]!r}: its fields are arguments of SparseConfig, "
            "whose values they get; make what is no argument a ClassVar"
        )
    return SOLVERS.register(cls)
