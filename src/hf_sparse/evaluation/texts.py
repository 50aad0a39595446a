"""What two models make of the same beginnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import EvaluationError
from .data import check_causal, check_positive, evaluating, load_data

PROMPTS = 3  # taken from the data if none are given,
PROMPT_TOKENS = 24  # of so many tokens


@dataclass(frozen=True)
class Texts:
    """A prompt and what follows.

    Attributes:
        prompt: what both models were given.
        dense: what the dense model goes on with; None if there is none.
        sparse: what the sparse model goes on with.
    """

    prompt: str
    dense: str | None
    sparse: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)


def make_prompts(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], data: Any, seed: int, split: str
) -> list[Tensor]:
    """Token ids to begin with, (1, tokens) each: of the prompts, or else from the data.

    Raises:
        EvaluationError: a prompt has no tokens.
        CalibrationError: the data are unusable.
    """
    if not prompts:
        settings = {"num_samples": PROMPTS, "batch_size": 1, "seed": seed, "split": split}
        loaded, _ = load_data(model, lambda: tokenizer, data, seq_len=None, **settings)  # type: ignore[arg-type]
        return [batch["input_ids"][:, :PROMPT_TOKENS] for batch in loaded.batches]
    encoded = [tokenizer(text, return_tensors="pt")["input_ids"] for text in prompts]
    for text, ids in zip(prompts, encoded, strict=True):
        if not ids.numel():
            raise EvaluationError(f"the prompt {text!r} has no tokens")
    return encoded


def continuations(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Tensor], new_tokens: int
) -> Iterator[str]:
    """What a model goes on with after each prompt, greedily."""
    check_causal(model)
    check_positive(new_tokens=new_tokens)
    device: Any = model.device
    with evaluating(model):
        for ids in prompts:
            generated = model.generate(  # type: ignore[operator]
                ids.to(device),
                attention_mask=torch.ones_like(ids, device=device),
                max_new_tokens=new_tokens,
                do_sample=False,
            )
            yield tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
