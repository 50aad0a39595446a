"""`hf-sparse methods`: what --method can be, and what each costs and needs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..command import Command

COSTS = (
    "no data, no pass through the model",
    "data, a pass through the model",
    "data, a pass through the model, 4 x inputs^2 bytes for each input of a block",
)
GRADIENTS = "gradients of every eighth batch"
STAGES = "a pass for each stage of a block, a second set of hidden states"
WIDTH, INDENT = 100, " " * 13


@dataclass(frozen=True)
class Method:
    """A value of --method.

    Attributes:
        name: as it is typed.
        kind: "recipe", or "method" for a plain one.
        about: what it does.
        costs: what it needs, and what it does with it.
        settings: the arguments that a recipe stands for.
    """

    name: str
    kind: str
    about: str
    costs: str
    settings: dict[str, object]

    def __str__(self) -> str:
        lines = [self.about, f"Needs {self.costs}."]
        if self.settings:
            made_of = (f"--{name} {value}" for name, value in self.settings.items())
            lines.append(f"The same as {' '.join(made_of)}.")
        filled = [
            textwrap.fill(x, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT) for x in lines
        ]
        return f"  {self.name:<10} " + "\n".join(filled).lstrip()


@dataclass(frozen=True)
class Methods:
    """All values of --method, in their order."""

    methods: Sequence[Method]

    def to_dict(self) -> dict[str, object]:
        """Their fields."""
        return {"methods": [asdict(method) for method in self.methods]}

    def __str__(self) -> str:
        lines = []
        for kind, text in (
            ("recipe", "recipes, a method and settings that go with it:"),
            ("method", "plain methods, as their papers have them:"),
        ):
            lines += [text, *(str(m) for m in self.methods if m.kind == kind)]
        return "\n".join(lines)


def methods() -> Methods:
    """What each method and recipe is, needs and costs."""
    from hf_sparse import SparseConfig
    from hf_sparse.config.recipes import RECIPES
    from hf_sparse.solvers import SOLVERS

    def costs(name: str) -> str:
        config = SparseConfig(method=name)
        more = [GRADIENTS] if config.needs_gradients else []
        more += [STAGES] if config.stages else []
        return "; ".join([COSTS[config.needs], *more])

    found = [
        Method(name, "recipe", recipe.about, costs(name), recipe.settings())
        for name, recipe in RECIPES.items()
    ]
    found += [Method(n, "method", solver.about, costs(n), {}) for n, solver in SOLVERS.items()]
    return Methods(found)


COMMAND = Command("methods", methods, ("hf-sparse methods", "hf-sparse methods --json"))
