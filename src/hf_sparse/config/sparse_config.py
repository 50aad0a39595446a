"""`SparseConfig`: everything a user can say about how a model is made sparse."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..core.data_record import DataRecord
from ..core.errors import ConfigError
from ..core.grids import Grid
from ..core.patterns import Pattern, parse_pattern
from ..core.statistics import Needs
from ..formats import check_format_name
from ..layers.attention.interface import parts
from .arguments import ARGUMENTS, RENAMED, Arguments, documented, unknown_arguments
from .contradictions import (
    check_format,
    check_input_sparsity,
    check_method,
    resolve_allocation,
    resolve_sparsity,
)
from .json_values import as_pairs, describe_dataset, describe_tokenizer, read_dataset
from .keys import QUANT_METHOD, SAVE_KEY
from .recipes import get_recipe, get_solver


class SparseConfig(Arguments, QuantizationConfigMixin):
    """How to prune a model and how to store the result.

    Pass it as `quantization_config` to `from_pretrained`, or to `hf_sparse.prune`.

    Args:
        {arguments}

    Raises:
        ConfigError: an argument is out of its range, unknown, or contradicts another one.

    A regex matches whole components of a layer's name: "q_proj" or "layers.1" (not "layers.11").
    """

    quant_method = QUANT_METHOD

    def __post_init__(self) -> None:
        """Put what holds in the place of what was left out, and check what holds together."""
        recipe = get_recipe(self.method)
        self.dataset = read_dataset(self.dataset)
        self.sparsity = resolve_sparsity(self.sparsity, self.pattern, self.method, self.experts)
        for name in ("refit", "target", "metric"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(recipe, name))
        if self.stages is None:
            # Without stages all layers of a block would make up for the same error of its inputs.
            self.stages = self.target == "dense"
        self.allocation = resolve_allocation(
            self.allocation, recipe.allocation, self.sparsity, self.pattern, self.method
        )
        check_method(
            self.method,
            refit=self.refit,
            stages=self.stages,
            target=self.target,
            metric=self.metric,
            low_rank=self.low_rank,
            bits=self.bits,
        )
        check_input_sparsity(self.input_sparsity, self.bits)
        if self.attention is not None:
            parts(self.attention)
        if self.format != "auto":
            check_format_name(self.format)
        check_format(
            self.format,
            pattern=self.pattern,
            method=self.method,
            low_rank=self.low_rank,
            bits=self.bits,
        )

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
    def spend_hessian(self) -> bool:
        """Is the solver the last to ask for a layer's Hessian?"""
        return not (self.refit or self.low_rank or self.target == "dense")

    @property
    def needs_gradients(self) -> bool:
        return "fisher" in (self.metric, self.allocation)

    def check_data(self) -> None:
        """Raise a ConfigError unless the method can run with the dataset given."""
        if isinstance(self.dataset, DataRecord):
            raise ConfigError(
                f"this config only describes its data ({self.dataset.source}): pass dataset= again "
                "to prune with it"
            )
        needed = self.needs > Needs.NOTHING or self.stages or self.allocation in ("owl", "fisher")
        needed = needed or (self.attention is not None and parts(self.attention)[0].learns)
        shares = self.experts, self.input_sparsity
        if self.dataset is None and (needed or any(share is not None for share in shares)):
            raise ConfigError(
                f"{self._describe_needs()} needs calibration data: pass dataset= a Hub id, the "
                "path of a text, JSON, csv or parquet file, or a list of strings, token ids or "
                "dicts"
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
            "experts": None,
            "input_sparsity": None,
            "attention": None,
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
        own = {k: v for k, v in config_dict.items() if k not in ("quant_method", SAVE_KEY)}
        arguments = {RENAMED.get(k, k): v for k, v in own.items()}  # of older checkpoints
        if unknown := sorted(set(arguments) - set(ARGUMENTS)):
            raise unknown_arguments(
                unknown,
                ". A newer hf_sparse may have written this config: update it",
            )
        config = cls(**arguments | {k: v for k, v in kwargs.items() if k in ARGUMENTS})
        unused = {k: v for k, v in kwargs.items() if k not in ARGUMENTS}
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """All arguments as JSON values; data are described, never contained."""
        values = self._arguments()
        values["dataset"] = describe_dataset(self.dataset)
        values["tokenizer"] = describe_tokenizer(self.tokenizer)
        for name in ("sparsity", "allocation"):
            values[name] = as_pairs(values[name])
        values["attention"] = None if self.attention is None else self.attention.to_dict()
        return {"quant_method": self.quant_method, **values}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What holds of a config that is passed for a checkpoint that has its own."""
        attention = {} if self.attention is None else {"attention": self.attention}
        return {"prefer": self.prefer, "activations": self.activations, **attention}

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

    def get(self, key: str, default: Any = None) -> Any:
        """As of `to_dict()`: transformers asks so where a model's own config is passed back."""
        return self.to_dict().get(key, default)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseConfig:
        """Shares dataset and tokenizer: transformers copies configs, data may not be copyable."""
        return self.replaced()

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ARGUMENTS}


SparseConfig.__doc__ = documented(SparseConfig.__doc__ or "")
