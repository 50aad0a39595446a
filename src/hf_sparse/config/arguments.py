"""The arguments of `SparseConfig`, each declared once: here, in `layer_arguments`, `run_arguments`.

The signature, the checks of single values, the docstring, the command line's options and the
docs' table are made from these lines. Nothing here needs torch: the command line reads it for a
mere `--help`.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from inspect import getattr_static
from typing import Any, get_args, get_type_hints

from ..core.errors import ConfigError
from ..core.registry import did_you_mean
from ..core.renamed import current_names
from ..core.untrusted_text import brief
from .argument import Argument
from .checks import choice, integer, optional, share
from .run_arguments import RunArguments

EXPERTS = "mixtures of experts"

# What is called otherwise now.
RENAMED = {"damp_percent": "damping"}


@dataclass(eq=False, repr=False)
class Arguments(RunArguments):
    """The arguments as fields; `SparseConfig` has them, and what follows from them together."""

    experts: Argument[float | None, float | None] = Argument(
        None,
        "Share of the experts of each mixture that are removed, with their rows of the router, "
        "0 < s < 1: exactly floor(s * n) of n, those with the lowest scores. What is left is a "
        "smaller model of the same family, and sparsity and bits hold inside it. It needs "
        "calibration data.",
        EXPERTS,
        optional(share),
    )
    expert_score: Argument[str, str] = Argument(
        "reap",
        'What an expert is worth: "reap", the mean over its tokens of gate times norm of its '
        'output, "contribution", the sum instead, "frequency", the number of its tokens, or '
        '"norm", the sum of its outputs\' norms.',
        EXPERTS,
        partial(choice, allowed=("reap", "contribution", "frequency", "norm")),
        shell_help="What an expert is worth: reap, the mean over its tokens of gate times norm of "
        "its output, contribution, the sum instead, frequency, the number of its tokens, or norm, "
        "the sum of its outputs' norms.",
    )
    expert_budget: Argument[str, str] = Argument(
        "layer",
        'Where the experts go: "layer", the same share of each, or "global", the lowest scores of '
        "all layers. The latter is for models whose config can say that layers differ.",
        EXPERTS,
        partial(choice, allowed=("layer", "global")),
        shell_help="Where the experts go: layer, the same share of each, or global, the lowest "
        "scores of all layers. The latter is for models whose config can say that layers differ.",
    )
    moe_min_tokens: Argument[int | None, int | None] = Argument(
        None,
        "Calibration tokens that an expert's layer needs for statistics of its own. The fewer were "
        "routed to it, the more they are those of all tokens that enter the experts.",
        EXPERTS,
        optional(partial(integer, least=0)),
        "as many as the layer has inputs, or 1 if the method uses their norms alone",
    )
    calibrate_all_experts: Argument[bool, bool] = Argument(
        False,
        "Take every expert's statistics from all tokens, routed to it or not. The model's own "
        "outputs are those of the routed ones.",
        EXPERTS,
        partial(choice, allowed=(True, False)),
    )

    def __post_init__(self) -> None:
        """What the arguments say together; nothing as long as each stands alone."""


def _declared() -> dict[str, Argument[Any, Any]]:
    """All arguments by name, with the types that they take."""
    found = {field.name: getattr_static(Arguments, field.name) for field in fields(Arguments)}
    for name, hint in get_type_hints(Arguments).items():
        given = get_args(hint)[0]
        found[name].kinds = tuple(t for t in get_args(given) or (given,) if t is not type(None))
    return found


ARGUMENTS: Mapping[str, Argument[Any, Any]] = _declared()


def unknown_arguments(names: Iterable[object], more: str = "") -> ConfigError:
    """The error for arguments that don't exist; names the near ones."""
    near = [(name, did_you_mean(name, ARGUMENTS)) for name in names]
    said = [f"{brief(name)} ({hint})" if hint else brief(name) for name, hint in near]
    return ConfigError(
        f"SparseConfig has no {', '.join(said)}; it knows {', '.join(ARGUMENTS)}{more}"
    )


def _with_near_names(init: Any) -> Any:
    """The generated `__init__`; it shows the types that users may pass, and names near names."""
    hints = get_type_hints(Arguments)
    init.__annotations__ = {n: get_args(hint)[0] for n, hint in hints.items()} | {"return": None}

    @functools.wraps(init)
    def __init__(self: Arguments, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        kwargs = current_names(kwargs, RENAMED)
        if unknown := [name for name in kwargs if name not in ARGUMENTS]:
            raise unknown_arguments(unknown)
        init(self, *args, **kwargs)

    return __init__


Arguments.__init__ = _with_near_names(Arguments.__init__)  # type: ignore[method-assign]


def documented(text: str) -> str:
    """A docstring in which {arguments} stands for all of them."""
    lines = [f"{a.name}: {a.help} Default {a.default_text}." for a in ARGUMENTS.values()]
    indented = [
        textwrap.fill(line, 100, initial_indent=" " * 8, subsequent_indent=" " * 12)
        for line in lines
    ]
    return text.replace("{arguments}", "\n".join(indented).lstrip())
