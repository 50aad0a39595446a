"""The arguments of `SparseConfig` that hold for any layer, each declared once; see `arguments`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .argument import Argument
from .checks import (
    choice,
    group_width,
    integer,
    optional,
    positive,
    regexes,
    text,
    text_or_pairs,
)

Pairs = Mapping[str, float] | Sequence[Any]  # {regex: fraction}, in JSON a list of pairs
Names = Argument[Sequence[str] | None, list[str] | None]

WHAT = "what to prune"
HOW = "method"
DATA = "data"
STORAGE = "storage"
THE_METHOD = "what the method says"


@dataclass(eq=False, repr=False)
class LayerArguments:
    """The arguments as fields, but for those of `run_arguments` and of mixtures of experts."""

    sparsity: Argument[float | Pairs | None, float | dict[str, float] | None] = Argument(
        None,
        "Fraction of zeros in each pruned weight, 0 <= s < 1, exactly floor(s * n) of n weights. "
        "Or {regex: s}: the first regex that matches a layer's name decides, a layer that none "
        "matches stays dense (in JSON a list of pairs, to keep their order).",
        WHAT,
        otherwise="0.5, or what an n:m pattern implies, or 0 with experts",
        shell_help="Fraction of zeros in each pruned weight, from 0 to below 1. Or JSON, "
        '\'{"mlp": 0.6, "q_proj": 0.5}\': the first regex that matches a layer\'s name decides, a '
        "layer that none matches stays dense.",
    )
    pattern: Argument[str, str] = Argument(
        "unstructured",
        '"unstructured", or "n:m" for n kept of m consecutive inputs.',
        WHAT,
        text,
        shell_help="unstructured, or n:m for n kept of m consecutive inputs, e.g. 2:4.",
    )
    method: Argument[str, str] = Argument(
        "sparsegpt",
        'A plain method, "sparsegpt", "wanda", "magnitude", "admm", "alps", "obc" or "adaprune", '
        'as its paper has it; or a recipe, "fast", "balanced" or "best". A recipe is a name for '
        'settings of the arguments below. "keep" prunes nothing and packs the zeros that the '
        "checkpoint already has.",
        HOW,
        shell_help="A plain method (sparsegpt, wanda, magnitude, admm, alps, obc or adaprune), a "
        "recipe (fast, balanced or best), or keep, which packs the zeros that the checkpoint "
        "already has. `hf-sparse methods` says what each is.",
    )
    dataset: Argument[Any, Any] = Argument(
        None,
        "Calibration data: a Hub dataset id, the path of a text, JSON, csv or parquet file, a "
        "`datasets.Dataset`, or an iterable of strings, of token id tensors, of dicts of model "
        "inputs or of rows with images, sound or conversations. Needed but for methods "
        "that use no data.",
        DATA,
        shell_help="Calibration data: a text, JSON, csv or parquet file, or a data set's id on the "
        "Hub, e.g. wikitext2. Needed but for methods that use no data.",
    )
    tokenizer: Argument[Any, Any] = Argument(
        None,
        "Id, path or object of a tokenizer, or for rows of a processor. For text and rows only.",
        DATA,
        otherwise="the model's own",
        shell_help="Folder or Hub id of a tokenizer, or for images and sound of a processor.",
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
        shell_help="Decides which samples are drawn when there are more than --num-samples.",
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
        "Names or regexes of layers left dense, in place of the default; routers and gates of "
        "mixtures stay dense whatever it says, unless targets names them.",
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
    damping: Argument[float, float] = Argument(
        0.01,
        "Damping of the Hessian H, as a fraction of mean(diag H), of methods that invert it.",
        HOW,
        positive,
    )
    block_size: Argument[int, int] = Argument(
        128, "SparseGPT's columns per mask decision.", HOW, partial(integer, least=1)
    )
    refit: Argument[int | None, int] = Argument(
        None,
        "Steps of the least-squares refit of the kept weights (conjugate gradients), 0 for none.",
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
        "What each layer is to reproduce on the inputs it gets in the pruned model: layer, its own "
        "outputs on them, or dense, the dense model's.",
    )
    metric: Argument[str | None, str] = Argument(
        None,
        'What the refit minimises: "inputs", the error of the layer\'s outputs, or "fisher", that '
        "error weighted by how much the model's loss feels it.",
        HOW,
        optional(partial(choice, allowed=("inputs", "fisher"))),
        THE_METHOD,
        "What the refit minimises: inputs, the error of the layer's outputs, or fisher, that error "
        "weighted by how much the model's loss feels it.",
    )
    allocation: Argument[str | Pairs | None, str | dict[str, float]] = Argument(
        None,
        'How the sparsity is spread over the layers: "uniform", "owl", "fisher", or {regex: s} for '
        "some layers while the others take what is left of the budget. It is met exactly (by "
        '"wanda" but for what rounding leaves in each row). Unstructured patterns only.',
        HOW,
        optional(text_or_pairs),
        THE_METHOD,
        "How the sparsity is spread over the layers: uniform, owl, fisher, or JSON, "
        "'{\"q_proj\": 0.3}', for some layers while the others take what is left of the budget. "
        "Unstructured patterns only.",
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
        shell_help="Integers symmetric about zero; --no-sym gives each group a zero point.",
    )
    format: Argument[str, str] = Argument(
        "auto",
        'Storage: "auto" (the smallest that fits, layer by layer), "bitmask", "n:m" or "dense".',
        STORAGE,
        text,
        shell_help="auto (the smallest that fits, layer by layer), bitmask, n:m or dense.",
    )
