"""A sparse model and the dense one it was made from, side by side."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..core.errors import EvaluationError
from ..core.renamed import renamed_arguments
from .agreement import Agreement, agreement
from .attention import AttentionDiagnosis
from .generation import GenerationSpeed, generation_speed
from .perplexity import Perplexity, perplexity
from .texts import Texts, continuations, make_prompts

Load = Callable[[], nn.Module]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; None, or empty, for what was not asked for.

    Attributes:
        perplexity: of the sparse model.
        dense_perplexity: of the dense model, on the same data.
        agreement: of both, with the error of the hidden states over depth.
        speed: generation by the sparse model.
        dense_speed: generation by the dense model.
        texts: what both generate.
        attention: from `diagnose_attention`.
    """

    perplexity: Perplexity | None = None
    dense_perplexity: Perplexity | None = None
    agreement: Agreement | None = None
    speed: GenerationSpeed | None = None
    dense_speed: GenerationSpeed | None = None
    texts: tuple[Texts, ...] = ()
    attention: AttentionDiagnosis | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; what was not measured is left out."""
        values = asdict(self)
        for name in ("speed", "dense_speed"):
            if (speed := getattr(self, name)) is not None:
                values[name] = speed.to_dict()
        return {name: value for name, value in values.items() if value}


@renamed_arguments(data="dataset")
def evaluate(
    model: nn.Module | Load,
    dense: nn.Module | Load | None = None,
    tokenizer: Any = None,
    dataset: Any = None,
    *,
    seq_len: int | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    split: str = "test",
    join_documents: bool = False,
    speed: bool = True,
    prompts: Sequence[str] = (),
    new_tokens: int = 48,
) -> Evaluation:
    """Measure perplexity, agreement with the dense model, speed, and generate text.

    Args:
        model: the sparse model, or a function that loads it.
        dense: the model it was made from, or a function that loads it. Functions are better: each
            model is then timed, and its peak memory measured, while the other one is not there. The
            dense one is loaded twice for that.
        tokenizer: of both; without it no text is generated.
        dataset: as for `perplexity`; None measures no perplexity and no agreement.
        seq_len, num_samples, seed, split, join_documents: as for `perplexity`.
        speed: time generation, too.
        prompts: beginnings for the models to go on with. Default the first 24 tokens of three
            samples of the data.
        new_tokens: tokens to generate after each prompt at most.

    Raises:
        EvaluationError: a model is no causal language model, or an argument is out of range.
        CalibrationError: the data are unusable.
    """
    if isinstance(prompts, str):
        raise EvaluationError(f"prompts={prompts!r} is one string: pass a list of them")
    settings: dict[str, Any] = {
        "seq_len": seq_len,
        "num_samples": num_samples,
        "seed": seed,
        "split": split,
        "join_documents": join_documents,
    }

    def measure(side: nn.Module) -> _Side:
        timed = generation_speed(side) if speed else None
        measured = perplexity(side, tokenizer, dataset, **settings) if dataset is not None else None
        if tokenizer is None or not (prompts or dataset is not None):
            return _Side(timed, measured)
        ids = make_prompts(side, tokenizer, prompts, dataset, seed, split)
        begun = [tokenizer.decode(x[0], skip_special_tokens=True) for x in ids]
        return _Side(timed, measured, begun, list(continuations(side, tokenizer, ids, new_tokens)))

    before = _Side() if dense is None else measure(_loaded(dense))
    gc.collect()  # models hold themselves in cycles: the dense one would stay in memory
    sparse = _loaded(model)
    after = measure(sparse)
    agreed = None
    if dense is not None and dataset is not None:
        agreed = agreement(sparse, _loaded(dense), tokenizer, dataset, depth=True, **settings)
    texts: Sequence[str | None] = before.texts or [None] * len(after.texts)
    return Evaluation(
        after.perplexity,
        before.perplexity,
        agreed,
        after.speed,
        before.speed,
        tuple(map(Texts, after.prompts, texts, after.texts)),
    )


@dataclass(frozen=True)
class _Side:
    """What was measured of one model."""

    speed: GenerationSpeed | None = None
    perplexity: Perplexity | None = None
    prompts: Sequence[str] = ()
    texts: Sequence[str] = ()


def _loaded(model: nn.Module | Load) -> nn.Module:
    return model if isinstance(model, nn.Module) else model()
