"""The arguments of `SparseConfig`, each declared once.

The signature, the checks of single values, the docstring, the command line's options and the
README's table are made from these lines. Nothing here needs torch: the command line reads it for a
mere `--help`.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args, get_type_hints

from ..core.errors import ConfigError
from ..core.registry import did_you_mean
from ..core.untrusted_text import brief
from .argument import Argument
from .checks import choice, group_width, integer, optional, positive, regexes, share

Pairs = Mapping[str, float] | Sequence[Any]  # {regex: fraction}, in JSON a list of pairs
Names = Argument[Sequence[str] | None, list[str] | None]

WHAT = "what to prune"
HOW = "how to prune it"
DATA = "calibration"
EXPERTS = "mixtures of experts"
STORAGE = "rounding and storage"
THE_METHOD = "what the method says"


@dataclass(eq=False, repr=False)
class Arguments:
    """The arguments as fields; `SparseConfig` has them, and what follows from them together."""

    sparsity: Argument[float | Pairs | None, float | dict[str, float] | None] = Argument(
        None,
        "Fraction of zeros in each pruned weight, 0 <= s < 1, exactly floor(s * n) of n weights. "
        "Or {regex: s}: the first regex that matches a layer's name decides, a layer that none "
        "matches stays dense (in JSON a list of pairs, to keep their order).",
        WHAT,
        otherwise="0.5, or what an n:m pattern implies, or 0 with experts",
    )
    pattern: Argument[str, str] = Argument(
        "unstructured", '"unstructured", or "n:m" for n kept of m consecutive inputs.', WHAT
    )
    method: Argument[str, str] = Argument(
        "sparsegpt",
        'A plain method, "sparsegpt", "wanda", "magnitude", "admm", "alps", "obc" or "adaprune", '
        'as its paper has it; or a recipe, "fast", "balanced" or "best". A recipe is a name for '
        'settings of the arguments below. "keep" prunes nothing and packs the zeros that the '
        "checkpoint already has.",
        HOW,
    )
    dataset: Argument[Any, Any] = Argument(
        None,
        "Calibration data: a Hub dataset id, the path of a text, JSON, csv or parquet file, a "
        "`datasets.Dataset`, or an iterable of strings, of token id tensors, of dicts of model "
        "inputs or of rows with images, sound or conversations. Needed but for methods "
        "that use no data.",
        DATA,
    )
    tokenizer: Argument[Any, Any] = Argument(
        None,
        "Id, path or object of a tokenizer, or for rows of a processor. For text and rows only.",
        DATA,
        otherwise="the model's own",
    )
    num_samples: Argument[int, int] = Argument(
        128, "Number of calibration samples.", DATA, partial(integer, least=1)
    )
    seq_len: Argument[int | None, int | None] = Argument(
        None,
        "Tokens a sample.",
        DATA,
        optional(partial(integer, least=1)),
        "2048, or what the model allows if that is less",
    )
    batch_size: Argument[int, int] = Argument(
        1, "Samples per forward pass while calibrating.", DATA, partial(integer, least=1)
    )
    seed: Argument[int, int] = Argument(
        0,
        "Decides which samples are drawn when there are more than num_samples.",
        DATA,
        partial(integer, least=0),
    )
    join_documents: Argument[bool, bool] = Argument(
        False,
        "Join all texts with blank lines and cut the stream, as papers do with wikitext2. "
        "Otherwise each text is a document behind a BOS token.",
        DATA,
        partial(choice, allowed=(True, False)),
    )
    modules_to_not_convert: Names = Argument(
        None,
        "Names or regexes of layers left dense.",
        WHAT,
        optional(regexes),
        "the output head, embeddings, and what the model ties or keeps in fp32",
    )
    targets: Names = Argument(
        None, "Regexes of the layers to prune.", WHAT, optional(regexes), "every linear layer"
    )
    blocks: Names = Argument(
        None,
        "Regexes of the modules that are pruned at once, on the inputs that the earlier ones "
        'leave. Each matches the last components of their names, e.g. "layers.[0-9]+". Layers '
        "outside are pruned one by one.",
        HOW,
        optional(regexes),
        "found: the elements of the model's layer lists",
    )
    damp_percent: Argument[float, float] = Argument(
        0.01, "SparseGPT's damping, as a fraction of mean(diag H).", HOW, positive
    )
    block_size: Argument[int, int] = Argument(
        128, "SparseGPT's columns per mask decision.", HOW, partial(integer, least=1)
    )
    refit: Argument[int | None, int] = Argument(
        None,
        "Steps of the least-squares refit of the kept weights (preconditioned conjugate gradients) "
        "after the mask is chosen, 0 for none.",
        HOW,
        optional(partial(integer, least=0)),
        THE_METHOD,
    )
    stages: Argument[bool | None, bool] = Argument(
        None,
        "Solve each block in stages, layers that feed others first, every stage on the inputs that "
        "the earlier ones have left.",
        HOW,
        optional(partial(choice, allowed=(True, False))),
        'with target="dense" alone',
    )
    target: Argument[str | None, str] = Argument(
        None,
        'What each layer is to reproduce on the inputs it gets in the pruned model: "layer", its '
        'own outputs on them, or "dense", the dense model\'s.',
        HOW,
        optional(partial(choice, allowed=("layer", "dense"))),
        THE_METHOD,
    )
    metric: Argument[str | None, str] = Argument(
        None,
        'What the refit minimises: "inputs", the error of the layer\'s outputs, or "fisher", that '
        "error weighted by how much the model's loss feels it.",
        HOW,
        optional(partial(choice, allowed=("inputs", "fisher"))),
        THE_METHOD,
    )
    allocation: Argument[str | Pairs | None, str | dict[str, float]] = Argument(
        None,
        'How the sparsity is spread over the layers: "uniform", "owl", "fisher", or {regex: s} for '
        "some layers while the others take what is left of the budget. It is met exactly (by "
        '"wanda" but for what rounding leaves in each row). Unstructured patterns only.',
        HOW,
        otherwise=THE_METHOD,
    )
    low_rank: Argument[int, int] = Argument(
        0,
        "Rank of a part B A that is held beside each sparse weight S and fitted with it, W ~ S + "
        "B A. It needs calibration data; 0 for none.",
        HOW,
        partial(integer, least=0),
    )
    bits: Argument[int | None, int | None] = Argument(
        None,
        "Round what is kept to integers of 8, 4 or 3 bits in the same run. With sparsity 0 this is "
        "quantisation alone.",
        STORAGE,
        partial(choice, allowed=(None, 8, 4, 3)),
        "the model's dtype",
    )
    group_size: Argument[int, int] = Argument(
        128, "Consecutive inputs that share a scale; -1 for all of a row.", STORAGE, group_width
    )
    sym: Argument[bool, bool] = Argument(
        True,
        "Integers symmetric about zero; False gives each group a zero point.",
        STORAGE,
        partial(choice, allowed=(True, False)),
    )
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
        'output, "frequency", the number of its tokens, or "norm", the sum of its outputs\' norms.',
        EXPERTS,
        partial(choice, allowed=("reap", "frequency", "norm")),
    )
    expert_budget: Argument[str, str] = Argument(
        "layer",
        'Where the experts go: "layer", the same share of each, or "global", the lowest scores of '
        "all layers. The latter is for models whose config can say that layers differ.",
        EXPERTS,
        partial(choice, allowed=("layer", "global")),
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
    format: Argument[str, str] = Argument(
        "auto",
        'Storage: "auto" (the smallest that fits, layer by layer), "bitmask", "n:m" or "dense".',
        STORAGE,
    )

    def __post_init__(self) -> None:
        """What the arguments say together; nothing as long as each stands alone."""


def _declared() -> dict[str, Argument[Any, Any]]:
    """All arguments by name, with the types that they take."""
    found = {n: a for n, a in vars(Arguments).items() if isinstance(a, Argument)}
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
