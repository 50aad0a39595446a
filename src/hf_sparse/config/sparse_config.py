"""`SparseConfig`: everything a user can say about how a model is made sparse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..core.data_record import DataRecord
from ..core.errors import ConfigError
from ..core.grids import Grid
from ..core.patterns import NM, Pattern, parse_pattern
from ..core.statistics import Needs
from ..formats import check_format_name
from ..formats.n_of_m import LARGEST_M
from .checks import choice, fraction, from_pairs, group_width, integer, positive, regexes
from .recipes import get_recipe, get_solver

QUANT_METHOD = "hf_sparse"
# In shards, their index and config.json: the id of the save that they are of.
SAVE_KEY = "hf_sparse_save"
DEFAULT_SPARSITY = 0.5


class SparseConfig(QuantizationConfigMixin):
    """How to prune a model and how to store the result.

    Pass it as `quantization_config` to `from_pretrained`, or to `hf_sparse.prune`.

    Args:
        sparsity: fraction of zeros in each pruned weight, 0 <= s < 1, exactly floor(s * n) of n
            weights; or `{regex: s}`: the first regex that matches a layer's name decides, a layer
            that none matches stays dense (in JSON a list of pairs, to keep their order). Default
            0.5, or what an n:m pattern implies.
        pattern: "unstructured", or "n:m" for n kept of m consecutive inputs.
        method: a plain method, "sparsegpt", "wanda", "magnitude", "admm", "alps", "obc" or
            "adaprune", as its paper has it; or a recipe, "fast", "balanced" or "best", a name for
            settings of the arguments below; "keep" prunes nothing and packs the zeros that the
            checkpoint already has.
        dataset: calibration data: a Hub dataset id, the path of a text, jsonl or parquet file, a
            `datasets.Dataset`, or an iterable of strings, of token id tensors, of dicts of model
            inputs or of rows with images, sound or conversations. None only for methods that need
            no data.
        tokenizer: id, path or object of a tokenizer, or for rows of a processor; None for the
            model's own. Only used for text and rows.
        num_samples: number of calibration samples. Default 128.
        seq_len: tokens a sample. Default min(2048, what the model allows).
        batch_size: samples per forward pass while calibrating. Default 1.
        seed: decides which samples are drawn when there are more than num_samples. Default 0.
        modules_to_not_convert: names or regexes of layers left dense. None: the output head,
            embeddings, and what the model ties or keeps in fp32.
        targets: regexes of the layers to prune; None for every linear layer.
        blocks: regexes of the modules that are pruned at once, on the inputs that the earlier ones
            leave; each matches the last components of their names, e.g. "layers.[0-9]+". None
            finds them: the elements of the model's layer lists. Layers outside are pruned one by
            one.
        damp_percent: SparseGPT's damping, as a fraction of mean(diag H). Default 0.01.
        block_size: SparseGPT's columns per mask decision. Default 128.
        refit: steps of the least-squares refit of the kept weights (preconditioned conjugate
            gradients) after the mask is chosen; 0 for none. None: what the method says, 0 for
            the plain ones; so for the next four.
        stages: solve each block in stages, layers that feed others first, every stage on the
            inputs that the earlier ones have left. Default: with target="dense" alone.
        target: what each layer is to reproduce on the inputs it gets in the pruned model: "layer",
            its own outputs on them, or "dense", the dense model's. Default "layer".
        metric: what the refit minimises: "inputs", the error of the layer's outputs, or "fisher",
            that error weighted by how much the model's loss feels it. Default "inputs".
        allocation: how the sparsity is spread over the layers: "uniform", "owl", "fisher", or
            `{regex: s}` for some layers while the others take what is left of the budget, which
            is met exactly (by "wanda" but for what rounding leaves in each row). Unstructured
            patterns only. Default "uniform".
        low_rank: rank of a part B A that is held beside each sparse weight S and fitted with it,
            W ~ S + B A; needs calibration data. 0 for none. Default 0.
        bits: round what is kept to integers of 8, 4 or 3 bits in the same run; None keeps the
            model's dtype. With sparsity 0 this is quantisation alone.
        group_size: consecutive inputs that share a scale; -1 for all of a row. Default 128.
        sym: integers symmetric about zero; False gives each group a zero point. Default True.
        moe_min_tokens: calibration tokens that an expert's layer needs for statistics of its own;
            the fewer were routed to it, the more they are those of all tokens that enter the
            experts. None: as many as the layer has inputs, or 1 if the method uses their norms
            alone. Default None.
        calibrate_all_experts: take every expert's statistics from all tokens, routed to it or
            not; the model's own outputs are those of the routed ones. Default False.
        format: storage: "auto" (the smallest that fits, layer by layer), "bitmask", "n:m" or
            "dense".

    Raises:
        ConfigError: an argument is out of its range, unknown, or contradicts another one.

    A regex matches whole components of a layer's name: "q_proj" or "layers.1" (not "layers.11").
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] | Sequence[Any] | None = None,
        pattern: str = "unstructured",
        method: str = "sparsegpt",
        dataset: Any = None,
        tokenizer: Any = None,
        num_samples: int = 128,
        seq_len: int | None = None,
        batch_size: int = 1,
        seed: int = 0,
        modules_to_not_convert: Sequence[str] | None = None,
        targets: Sequence[str] | None = None,
        blocks: Sequence[str] | None = None,
        damp_percent: float = 0.01,
        block_size: int = 128,
        refit: int | None = None,
        stages: bool | None = None,
        target: str | None = None,
        metric: str | None = None,
        allocation: str | Mapping[str, float] | Sequence[Any] | None = None,
        low_rank: int = 0,
        bits: int | None = None,
        group_size: int = 128,
        sym: bool = True,
        moe_min_tokens: int | None = None,
        calibrate_all_experts: bool = False,
        format: str = "auto",
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.pattern = pattern
        self.method = method
        self.sparsity = _resolve_sparsity(sparsity, pattern, method)
        self.dataset = DataRecord(**dataset) if _is_record(dataset) else dataset
        self.tokenizer = tokenizer
        self.num_samples = integer("num_samples", num_samples, 1)
        self.seq_len = None if seq_len is None else integer("seq_len", seq_len, 1)
        self.batch_size = integer("batch_size", batch_size, 1)
        self.seed = integer("seed", seed, 0)
        self.modules_to_not_convert = regexes("modules_to_not_convert", modules_to_not_convert)
        self.targets = regexes("targets", targets)
        self.blocks = regexes("blocks", blocks)
        self.damp_percent = positive("damp_percent", damp_percent)
        self.block_size = integer("block_size", block_size, 1)
        recipe = get_recipe(method)
        self.refit = integer("refit", _default(refit, recipe.refit), 0)
        self.target = choice("target", _default(target, recipe.target), ("layer", "dense"))
        # Without stages all layers of a block would make up for the same error of its inputs.
        self.stages = choice("stages", _default(stages, self.target == "dense"), (True, False))
        self.metric = choice("metric", _default(metric, recipe.metric), ("inputs", "fisher"))
        self.allocation = _resolve_allocation(allocation, recipe.allocation, self)
        self.low_rank = integer("low_rank", low_rank, 0)
        self.bits = choice("bits", bits, (None, 8, 4, 3))
        self.group_size = group_width(group_size)
        self.sym = choice("sym", sym, (True, False))
        least = None if moe_min_tokens is None else integer("moe_min_tokens", moe_min_tokens, 0)
        self.moe_min_tokens = least
        self.calibrate_all_experts = choice(
            "calibrate_all_experts", calibrate_all_experts, (True, False)
        )
        self._check_combination()
        self.format = format if format == "auto" else check_format_name(format)
        self._check_format()

    @property
    def solver(self) -> str:
        """The registered name of the solver that chooses the masks."""
        return get_recipe(self.method).solver

    @property
    def needs(self) -> Needs:
        """The statistics of a layer's inputs that the method needs."""
        needs = get_solver(self.method).needs
        extras = self.refit or self.low_rank or self.target == "dense"
        return Needs.HESSIAN if extras else needs

    @property
    def grid(self) -> Grid | None:
        """What kept weights are rounded to."""
        size = None if self.group_size == -1 else self.group_size
        return None if self.bits is None else Grid(self.bits, size, self.sym)

    @property
    def joint_grid(self) -> Grid | None:
        """The grid that a solver may round to in its own pass: none if values are refitted."""
        return None if self.refit else self.grid

    @property
    def needs_gradients(self) -> bool:
        return "fisher" in (self.metric, self.allocation)

    def _check_combination(self) -> None:
        if self.metric == "fisher" and not self.refit:
            raise ConfigError(
                "metric='fisher' is what the refit minimises, and refit is 0: pass refit=20"
            )
        extras = self.refit or self.stages or self.target != "layer" or self.bits is not None
        if get_solver(self.method).chooses_pattern and (extras or self.low_rank):
            raise ConfigError(
                f"method={self.method!r} changes no weight: it takes neither refit, stages, "
                "target, low_rank nor bits"
            )

    def _check_format(self) -> None:
        if self.format == "dense" and self.low_rank and self.bits is None:
            raise ConfigError(
                "format='dense' holds no low-rank part beside the weight: leave format out, or "
                "low_rank"
            )
        if self.format == "n:m" and self.pattern == "unstructured" and self.method != "keep":
            raise ConfigError("format='n:m' stores n:m patterns only: pass pattern='n:m', e.g. 2:4")
        parsed = parse_pattern(self.pattern, DEFAULT_SPARSITY)
        if self.format == "n:m" and isinstance(parsed, NM) and parsed.m > LARGEST_M:
            raise ConfigError(
                f"format='n:m' takes groups of at most {LARGEST_M}, pattern={self.pattern!r} has "
                f"m = {parsed.m}: pass format='auto' or 'bitmask'"
            )

    def check_data(self) -> None:
        """Raise a ConfigError unless the method can run with the dataset given."""
        if isinstance(self.dataset, DataRecord):
            raise ConfigError(
                f"this config only describes its data ({self.dataset.source}): pass dataset= again "
                "to prune with it"
            )
        needed = self.needs > Needs.NOTHING or self.stages or self.allocation in ("owl", "fisher")
        if self.dataset is None and needed:
            raise ConfigError(
                f"{self._describe_needs()} needs calibration data: pass dataset= a Hub id, the "
                "path of a text, jsonl or parquet file, or a list of strings, token ids or dicts"
            )

    def _describe_needs(self) -> str:
        """The argument because of which data are needed."""
        if get_solver(self.method).needs > Needs.NOTHING:
            return f"method={self.method!r}"
        plain = {
            "refit": 0,
            "target": "layer",
            "stages": False,
            "low_rank": 0,
            "allocation": "uniform",
        }
        name = next(k for k, v in plain.items() if getattr(self, k) != v)
        return f"{name}={getattr(self, name)!r}"

    def layer_pattern(self, sparsity: float) -> Pattern:
        """The pattern of a layer that is pruned to `sparsity`."""
        return parse_pattern(self.pattern, sparsity)

    def replaced(self, **changes: Any) -> SparseConfig:
        """A copy with some arguments changed, validated anew."""
        return SparseConfig(**(self._arguments() | changes))

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Rebuild from `to_dict()`.

        Raises:
            ConfigError: an unknown key; a newer version of this package may have written it.
        """
        arguments = {k: v for k, v in config_dict.items() if k not in ("quant_method", SAVE_KEY)}
        known = _ARGUMENTS
        if unknown := sorted(set(arguments) - set(known)):
            raise ConfigError(
                f"SparseConfig has no {', '.join(map(repr, unknown))}; it knows {', '.join(known)}."
                " A newer hf_sparse may have written this config: pip install -U hf-sparse"
            )
        config = cls(**arguments | {k: v for k, v in kwargs.items() if k in known})
        unused = {k: v for k, v in kwargs.items() if k not in known}
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """All arguments as JSON values; data are described, never contained."""
        values = self._arguments()
        values["dataset"] = describe_dataset(self.dataset)
        values["tokenizer"] = _tokenizer_name(self.tokenizer)
        if isinstance(self.sparsity, dict):
            # The first regex that matches decides; JSON objects are written with sorted keys.
            values["sparsity"] = [[regex, value] for regex, value in self.sparsity.items()]
        if isinstance(self.allocation, dict):
            values["allocation"] = [[regex, value] for regex, value in self.allocation.items()]
        return {"quant_method": self.quant_method, **values}

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the method's defaults, and always method, sparsity and pattern."""
        always = ("quant_method", "method", "sparsity", "pattern")
        defaults = SparseConfig(method=self.method, pattern=self.pattern).to_dict()
        return {k: v for k, v in self.to_dict().items() if k in always or v != defaults[k]}

    def __repr__(self) -> str:
        values = self.to_diff_dict()
        del values["quant_method"]
        return f"SparseConfig({', '.join(f'{k}={v!r}' for k, v in values.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SparseConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseConfig:
        """Shares dataset and tokenizer: transformers copies configs, data may not be copyable."""
        return self.replaced()

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _ARGUMENTS}


_ARGUMENTS = tuple(
    name for name in SparseConfig.__init__.__annotations__ if name not in ("self", "return")
)


def describe_dataset(dataset: Any) -> Any:
    """A JSON value that says what a dataset is: a string as it is, anything else as its type."""
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, Path):
        return str(dataset)
    if isinstance(dataset, DataRecord):
        return asdict(dataset)
    items = f" of {type(dataset[0]).__name__}" if isinstance(dataset, list) and dataset else ""
    return asdict(DataRecord(type(dataset).__name__ + items))


def _is_record(dataset: Any) -> bool:
    return isinstance(dataset, Mapping) and set(dataset) == {f.name for f in fields(DataRecord)}


def _tokenizer_name(tokenizer: Any) -> str | None:
    if tokenizer is None or isinstance(tokenizer, str):
        return tokenizer
    if isinstance(tokenizer, Path):
        return str(tokenizer)
    return getattr(tokenizer, "name_or_path", None) or type(tokenizer).__name__


def _resolve_sparsity(
    sparsity: float | Mapping[str, float] | Sequence[Any] | None, pattern: str, method: str
) -> float | dict[str, float] | None:
    """The sparsity that holds: given, implied by n:m, or None where the method decides."""
    if get_solver(method).chooses_pattern:
        if sparsity is not None or pattern != "unstructured":
            raise ConfigError(
                f"method={method!r} keeps the zeros that are there: it takes neither sparsity "
                f"nor pattern, found sparsity={sparsity!r}, pattern={pattern!r}"
            )
        return None
    sparsity = from_pairs(sparsity)
    parsed = parse_pattern(pattern, DEFAULT_SPARSITY)
    implied = parsed.sparsity
    if sparsity is None:
        return implied
    if isinstance(sparsity, Mapping):
        if not sparsity:
            raise ConfigError("sparsity={} prunes nothing: pass {regex: fraction} or a fraction")
        regexes("sparsity", list(sparsity))
        values = {k: fraction(f"sparsity[{k!r}]", v) for k, v in sparsity.items()}
    else:
        values = {"": fraction("sparsity", sparsity)}
    for key, value in values.items():
        # A layer may be left alone (0); any other value must be what n:m gives.
        allowed = (implied, 0.0) if isinstance(sparsity, Mapping) else (implied,)
        if isinstance(parsed, NM) and not any(math.isclose(value, a) for a in allowed):
            where = f" for {key!r}" if key else ""
            raise ConfigError(
                f"sparsity={value}{where} contradicts pattern={pattern!r}, which makes "
                f"{Fraction(parsed.m - parsed.n, parsed.m)} of the weights zero: leave sparsity out"
            )
    return values if isinstance(sparsity, Mapping) else values[""]


def _resolve_allocation(given: Any, default: str, config: SparseConfig) -> str | dict[str, float]:
    """The allocation that holds: a recipe's gives way where it has no meaning, a given one not."""
    obstacle = None
    if config.pattern != "unstructured":
        obstacle = f"pattern={config.pattern!r} fixes every layer's sparsity"
    elif isinstance(config.sparsity, dict):
        obstacle = "sparsity gives each layer its own already"
    elif config.sparsity is None:
        obstacle = f"method={config.method!r} keeps the zeros that are there"
    if given is None:
        return "uniform" if obstacle else default
    if given != "uniform" and obstacle:
        raise ConfigError(f"allocation={given!r} can't be met: {obstacle}. Leave allocation out")
    given = from_pairs(given)
    if not isinstance(given, Mapping):
        return str(choice("allocation", given, ("uniform", "owl", "fisher")))
    if not given:
        raise ConfigError("allocation={} names no layer: pass {regex: fraction} or 'uniform'")
    regexes("allocation", list(given))
    return {k: fraction(f"allocation[{k!r}]", v) for k, v in given.items()}


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value
