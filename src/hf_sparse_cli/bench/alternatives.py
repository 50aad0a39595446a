"""One model in the forms that a user could run it in: speed, bytes, and what each is worth.

Dense in fp32 and bf16, sparse, what torchao and bitsandbytes make of the dense one where they are
installed, and llama.cpp's file types where its program `llama-bench` is named. All models of torch
are in memory together and take turns, round by round, so that what else the machine does hits all
of them alike; llama.cpp is timed by its own program, right after them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_sparse.core.logging import progress_bar
from hf_sparse.evaluation.generation import time_generation
from hf_sparse.evaluation.memory import weight_bytes
from hf_sparse.evaluation.perplexity import perplexity

from . import llama_file


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        sparse, dense: checkpoints, folders or Hub ids.
        data: text for perplexity, as for `hf_sparse.perplexity`; None for none.
        seq_len, num_samples: of that.
        prompt, tokens, rounds: a prompt of so many tokens, then so many decoded ones, so often.
        llama_bench: llama.cpp's program; None for none.
    """

    sparse: str
    dense: str
    data: str | None
    seq_len: int
    num_samples: int
    prompt: int
    tokens: int
    rounds: int
    llama_bench: Path | None


@dataclass(frozen=True)
class Alternative:
    """One form of the model.

    Attributes:
        name: what it is.
        tokens_per_second: decoded, the prompt's time not counted.
        nbytes: of its weights in memory, those of a file for llama.cpp.
        perplexity: on the data; None if it was not measured.
        problem: why there are no figures; "" if there are.
    """

    name: str
    tokens_per_second: float = 0.0
    nbytes: int = 0
    perplexity: float | None = None
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Its values."""
        return asdict(self)


def _torchao(dense: str) -> PreTrainedModel:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = _load(dense, torch.bfloat16)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def _bitsandbytes(dense: str) -> PreTrainedModel:
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return _load(dense, torch.bfloat16, quantization_config=nf4, device_map="cpu")


# What is made of the dense checkpoint by others, by the package that it needs.
OTHERS: Mapping[str, tuple[str, Callable[[str], PreTrainedModel]]] = {
    "torchao int8": ("torchao", _torchao),
    "bitsandbytes nf4": ("bitsandbytes", _bitsandbytes),
}


def measure(settings: Settings) -> list[Alternative]:
    """A row for each form; those whose package is missing or fails say so."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense fp32": lambda: _load(settings.dense, torch.float32),
        "dense bf16": lambda: _load(settings.dense, torch.bfloat16),
        "hf_sparse": lambda: _load(settings.sparse, torch.bfloat16),
    }
    rows: list[Alternative] = []
    models = {name: make() for name, make in makers.items()}
    prompt = _prompt(models["hf_sparse"], settings.prompt)
    for name, (package, make) in OTHERS.items():
        if find_spec(package) is None:
            rows.append(Alternative(name, problem=f"{package} is not installed"))
            continue
        try:
            model = make(settings.dense)
            time_generation(model, prompt, 1)
            models[name] = model
        except Exception as error:  # another package's, of any class: the others are measured
            rows.append(Alternative(name, problem=f"{type(error).__name__}: {error}"))
    measured = [
        Alternative(name, 1 / seconds, weight_bytes(models[name]), _worth(models[name], settings))
        for name, seconds in _decode_seconds(models, prompt, settings).items()
    ]
    return [*measured, *rows, *_llama(models["dense fp32"], settings)]


def _load(model: str, dtype: torch.dtype, **more: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **more).eval()


def _prompt(model: nn.Module, tokens: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, tokens), generator=random)  # type: ignore


def _decode_seconds(
    models: Mapping[str, nn.Module], prompt: Tensor, settings: Settings
) -> dict[str, float]:
    """Median seconds of a token, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with progress_bar((settings.rounds + 1) * len(models), "Generation") as bar:
        for index in range(settings.rounds + 1):  # the first warms up
            for name, model in models.items():
                taken = time_generation(model, prompt, settings.tokens if index else 1)[1]
                if index:
                    seconds[name].append(taken)
                bar.update()
    return {name: median(times) for name, times in seconds.items()}


def _worth(model: nn.Module, settings: Settings) -> float | None:
    if settings.data is None:
        return None
    from hf_sparse.calibration.tokenizers import find_tokenizer

    tokenizer = find_tokenizer(settings.dense, None, None)
    length, number = settings.seq_len, settings.num_samples
    return perplexity(
        model, tokenizer, settings.data, seq_len=length, num_samples=number
    ).perplexity


def _llama(dense: nn.Module, settings: Settings) -> list[Alternative]:
    """llama.cpp's file types; it tells no perplexity, whatever the file."""
    if settings.llama_bench is None:
        return []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in llama_file.KINDS:
            file = Path(folder) / f"{kind}.gguf"
            try:
                llama_file.write(dense, file, kind)
                speed = llama_file.decode_speed(
                    settings.llama_bench, file, settings.tokens, settings.rounds
                )
                rows.append(Alternative(f"llama.cpp {kind}", speed, file.stat().st_size))
            except (llama_file.LlamaError, ImportError) as error:
                rows.append(Alternative(f"llama.cpp {kind}", problem=str(error)))
    return rows
