"""compare: every method at every sparsity, on the same data and the same dense model.

The data are tokenised once, and what is measured of the dense model is measured once.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...calibration.tokenizers import load_tokenizer
from ...config.sparse_config import SparseConfig
from ...core.data_record import DataRecord
from ...core.errors import ConfigError, EvaluationError, HfSparseError
from ...core.logging import get_logger, progress_bar
from ...core.renamed import renamed_arguments
from ...kernels.machine import Environment
from ...pruning.dense_measurements import DenseMeasurements
from ...pruning.prune import measurements_of, prune_in_place, require_dense
from ..data import evaluating, load_data
from ..perplexity import perplexity
from .point import ComparisonPoint
from .result import Comparison

logger = get_logger(__name__)

VARIED = ("method", "sparsity", "pattern")
# Arguments that decide on the calibration data, which all methods share.
OF_DATA = ("dataset", "tokenizer", "num_samples", "seq_len", "batch_size", "seed", "join_documents")

Evaluate = Callable[[nn.Module], float]
Methods = Sequence[str] | Mapping[str, Mapping[str, Any]]


@renamed_arguments(evaluation_data="eval_dataset", evaluation_samples="eval_samples")
def compare(
    model: nn.Module | Callable[[], nn.Module],
    methods: Methods,
    sparsities: Sequence[float | str],
    eval_dataset: Any = None,
    *,
    evaluate: Evaluate | None = None,
    eval_samples: int | None = None,
    **settings: Any,
) -> Comparison:
    """Prune a model by each method at each sparsity and put perplexity, time and bytes in a table.

    Args:
        model: a dense model, or a function that loads it. A model is left as it is: each run has a
            copy on the same devices, so twice the model's memory is needed. A function is called
            for the dense model and for each run, and only one of them is in memory at a time.
        methods: names of recipes or plain methods, or `{label: arguments of SparseConfig}`, e.g.
            `{"wanda + refit": {"method": "wanda", "refit": 10}}`.
        sparsities: fractions of zeros, or n:m patterns such as "2:4".
        eval_dataset: perplexity is measured on them; as `SparseConfig.dataset`, packed to
            `seq_len`, and joined with `join_documents`, like the calibration data.
        evaluate: measures a model, dense or pruned, in place of perplexity; called in eval mode
            without gradients. It must not change the model. Its name heads the column.
        eval_samples: sequences of `eval_dataset` to use at most. Default all.
        settings: arguments of `SparseConfig` for all runs: dataset, num_samples, bits, ...

    Returns:
        The scores, times and bytes. A run that fails with an HfSparseError is reported there with
        its error, and the others go on.

    Raises:
        ConfigError: a method, sparsity or setting is unknown or contradicts another, or the model
            is sparse already; all before the first run.
        EvaluationError: neither or both of eval_dataset and evaluate, or the model can't be
            evaluated.
        CalibrationError: the data are unusable.
        HfSparseError: that of the first run, if every run failed.
    """
    runs = _plan(methods, sparsities, settings)
    if (eval_dataset is None) == (evaluate is None):
        raise EvaluationError(
            "compare needs either eval_dataset, for perplexity, or evaluate, a function that "
            "takes a model and gives a number"
        )
    load = _loader(model)
    with progress_bar(len(runs) + 1, "Comparing") as bar:
        dense = model if isinstance(model, nn.Module) else load()
        require_dense(dense)
        config = runs[0].config
        measurements, record = measurements_of(dense, config), None
        if evaluate is None:
            evaluate, record = _perplexity(dense, config, eval_dataset, eval_samples)
        score = _score(evaluate, dense)
        name = getattr(dense, "name_or_path", None) or type(dense).__name__
        device = next(dense.parameters()).device
        del dense
        bar.update()
        points = _measure(runs, load, measurements, evaluate, bar)
    shared = config.to_dict()
    return Comparison(
        model=str(name),
        measure=_name(evaluate),
        dense=score,
        points=tuple(points),
        settings={name: shared[name] for name in dict.fromkeys((*OF_DATA, *settings))},
        methods=_arguments(methods),
        data=measurements.data.record if measurements.data else None,
        evaluation=record,
        environment=Environment.here(device),
    )


@dataclass(frozen=True)
class _Run:
    """A method at a sparsity."""

    label: str
    setting: float | str
    config: SparseConfig


def _arguments(methods: Methods) -> dict[str, dict[str, Any]]:
    """The arguments of `SparseConfig` of each method, by its label."""
    if isinstance(methods, Mapping):
        return {label: dict(arguments) for label, arguments in methods.items()}
    return {name: {"method": name} for name in methods}


def _plan(
    methods: Methods, sparsities: Sequence[float | str], settings: Mapping[str, Any]
) -> list[_Run]:
    """All runs, their configs checked."""
    for name, given in (("methods", methods), ("sparsities", sparsities)):
        if isinstance(given, str) or not isinstance(given, Collection) or not given:
            raise ConfigError(f"{name}={given!r} must be a list with at least one entry")
    for name in VARIED:
        if name in settings:
            raise ConfigError(f"{name} is what compare varies: pass methods and sparsities")
    runs = []
    for label, arguments in _arguments(methods).items():
        for name in arguments:
            if name in OF_DATA or name in VARIED[1:]:
                raise ConfigError(
                    f"method {label!r} has its own {name}: it must be the same for all"
                )
        for setting in sparsities:
            amount = {"pattern" if isinstance(setting, str) else "sparsity": setting}
            config = SparseConfig.from_dict({**settings, **arguments, **amount})
            config.check_data()
            runs.append(_Run(label, setting, config))
    return runs


def _loader(model: Any) -> Callable[[], nn.Module]:
    """What gives each run a dense model of its own."""
    if isinstance(model, nn.Module):
        return lambda: copy.deepcopy(model)
    if not callable(model):
        raise ConfigError(
            f"model is a {type(model).__name__}: pass a model, or a function that loads one, e.g. "
            "lambda: AutoModelForCausalLM.from_pretrained(...)"
        )

    def load() -> nn.Module:
        loaded = model()
        if not isinstance(loaded, nn.Module):
            raise ConfigError(f"the function passed as model gave a {type(loaded).__name__}")
        return loaded

    return load


def _measure(
    runs: Sequence[_Run],
    load: Callable[[], nn.Module],
    measurements: DenseMeasurements,
    evaluate: Evaluate,
    bar: Any,
) -> list[ComparisonPoint]:
    """Do the runs; raises the first one's error if all fail."""
    points: list[ComparisonPoint] = []
    failures: list[HfSparseError] = []
    for run in runs:
        bar.set_description(f"Comparing: {run.label}, {run.setting}")
        gc.collect()  # models hold themselves in cycles: the last one would stay in memory
        try:
            points.append(_point(run, load, measurements, evaluate))
        except HfSparseError as error:
            # Its words alone: its traceback holds the model.
            failures.append(type(error)(str(error)))
            points.append(ComparisonPoint(run.label, run.setting, error=str(error)))
            logger.warning("%s at %s failed: %s", run.label, run.setting, str(error))
        bar.update()
    if len(failures) == len(runs):
        raise failures[0]
    return points


def _point(
    run: _Run, load: Callable[[], nn.Module], measurements: DenseMeasurements, evaluate: Evaluate
) -> ComparisonPoint:
    model = load()
    reused = measurements.reused_seconds
    report = prune_in_place(model, run.config, measurements)
    return ComparisonPoint(
        run.label,
        run.setting,
        sparsity=report.sparsity,
        score=_score(evaluate, model),
        seconds=report.seconds + measurements.reused_seconds - reused,
        bytes_dense=report.bytes_before,
        bytes_stored=report.bytes_after,
        bytes_resident=report.bytes_resident,
    )


def _perplexity(
    model: nn.Module, config: SparseConfig, data: Any, samples: int | None
) -> tuple[Evaluate, DataRecord]:
    """A function that measures perplexity on data that are tokenised now, and their record."""
    loaded, seq_len = load_data(
        model,
        lambda: load_tokenizer(config.tokenizer, model),
        data,
        seq_len=config.seq_len,
        num_samples=samples,
        batch_size=config.batch_size,
        seed=config.seed,
        split="test",
        join_documents=config.join_documents,
    )

    def measure(model: nn.Module) -> float:
        return perplexity(model, None, list(loaded.batches), seq_len).perplexity

    measure.__name__ = "perplexity"
    return measure, loaded.record


def _score(evaluate: Evaluate, model: nn.Module) -> float:
    with evaluating(model):
        found: Any = evaluate(model)
    try:
        return float(found)
    except (TypeError, ValueError):
        raise EvaluationError(
            f"evaluate gave a {type(found).__name__}: it has to give a number"
        ) from None


def _name(evaluate: Evaluate) -> str:
    name = getattr(evaluate, "__name__", "")
    return name if name.isidentifier() else "score"
