"""Speed and peak memory of greedy generation with a cache."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from inspect import signature
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..core.logging import progress_bar
from ..kernels.machine import processor
from .data import check_causal, check_positive, evaluating
from .memory import peak, reset_peak, weight_bytes


@dataclass(frozen=True)
class GenerationSpeed:
    """What `generation_speed` measured.

    Attributes:
        prompt_tokens, new_tokens: lengths of the prompt and of what follows.
        prefill_seconds: median time of the prompt.
        decode_seconds: median time of a generated token.
        weight_bytes: all parameters and buffers in memory, each storage once.
        peak_bytes: highest memory while generating: allocated on a GPU, on a CPU resident in the
            whole process; 0 where the system doesn't tell.
        machine: processor or GPU, and threads.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    weight_bytes: int
    peak_bytes: int
    machine: str

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second, the prompt's time not counted."""
        return 1 / self.decode_seconds

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:.1f} tokens/s after a prompt of {self.prompt_tokens} in "
            f"{self.prefill_seconds:.3f} s; weights {self.weight_bytes / 1e6:.1f} MB, peak "
            f"{self.peak_bytes / 1e6:.1f} MB ({self.machine})"
        )


def generation_speed(
    model: nn.Module,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    rounds: int = 3,
    seed: int = 0,
) -> GenerationSpeed:
    """Time greedy generation of one sequence: medians over rounds, after one that warms up.

    Args:
        model: a transformers causal language model, sparse or dense.
        prompt_tokens: length of the prompt, random token ids.
        new_tokens: tokens generated a round.
        rounds: how often.
        seed: of the prompt.

    Raises:
        EvaluationError: an argument is out of range, or the model is no causal language model.
    """
    check_causal(model)
    check_positive(prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator)
    device: torch.device = model.device  # type: ignore[assignment]
    prompt = prompt.to(device)
    times = []
    with evaluating(model), progress_bar(rounds, "Generation") as bar:
        time_generation(model, prompt, 1)
        reset_peak(device)
        for _ in range(rounds):
            times.append(time_generation(model, prompt, new_tokens)[:2])
            bar.update()
    prefill, decode = (median(values) for values in zip(*times, strict=True))
    return GenerationSpeed(
        prompt_tokens,
        new_tokens,
        prefill,
        decode,
        weight_bytes(model),
        peak(device),
        machine(device),
    )


@torch.no_grad()
def time_generation(model: nn.Module, prompt: Tensor, tokens: int) -> tuple[float, float, Tensor]:
    """Seconds for the prompt, seconds a token, and the prompt's last logits.

    Args:
        model: a causal language model.
        prompt: token ids, (1, length), on the model's device.
        tokens: how many to generate, greedily and with a cache.
    """
    taken = signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
    cache = "cache" if "cache" in taken else "past_key_values"  # its name before transformers 5.24
    started = _now(prompt.device)
    out = model(prompt, use_cache=True, **last)
    prefilled = _now(prompt.device)
    logits: Tensor = out.logits[:, -1]
    for _ in range(tokens):
        following = out.logits[:, -1:].argmax(dim=-1)
        out = model(following, use_cache=True, **{cache: out[cache]})
    return prefilled - started, (_now(prompt.device) - prefilled) / tokens, logits


def _now(device: torch.device) -> float:
    """The time once all work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: torch.device) -> str:
    """The GPU's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"
