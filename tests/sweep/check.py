"""What one model type must do: run, prune, keep exact counts, save, reload to the same bits."""

from __future__ import annotations

import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from inputs import find_inputs
from safetensors import safe_open
from tiny import default_config, tiny_config
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import hf_sparse
from hf_sparse import SparseConfig

# Kind -> (transformers' mapping, auto class).
KINDS = {
    "causal LM": ("MODEL_FOR_CAUSAL_LM_MAPPING", "AutoModelForCausalLM"),
    "masked LM": ("MODEL_FOR_MASKED_LM_MAPPING", "AutoModelForMaskedLM"),
    "sequence to sequence": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "AutoModelForSeq2SeqLM"),
    "image classification": (
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
        "AutoModelForImageClassification",
    ),
    "speech to text": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "AutoModelForSpeechSeq2Seq"),
    "speech CTC": ("MODEL_FOR_CTC_MAPPING", "AutoModelForCTC"),
    "image-text to text": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "AutoModelForImageTextToText"),
}
PASS, FAIL, NOT_BUILT = "passes", "fails", "not built"
NOTHING = "has nothing to prune"
UNREACHED = "no calibration token"  # why a layer that the model never calls stays dense
BATCHES = 4
PATTERNS = ("unstructured", "2:4")


@dataclass(frozen=True)
class Outcome:
    """What came of one model type."""

    kind: str
    model_type: str
    status: str
    reason: str = ""
    outside: bool = False
    """Does the reason lie outside this project: in transformers, or in a package that it needs?"""
    layers: int = 0
    never_called: int = 0
    generates: bool = False
    seconds: float = 0.0


class _Failure(Exception):  # noqa: N818 - carries an outcome
    def __init__(self, status: str, reason: str, outside: bool = False) -> None:
        super().__init__(reason)
        self.status, self.outside = status, outside


def types_of(kind: str) -> list[str]:
    """The model types that transformers registers for a kind."""
    names = getattr(transformers.models.auto.modeling_auto, f"{KINDS[kind][0]}_NAMES")
    return list(names)


def check(
    kind: str,
    model_type: str,
    reload: Callable[[Path, type, dict[str, Tensor]], list[Tensor]] | None = None,
) -> Outcome:
    """Take one type through all stages.

    Args:
        kind: a key of `KINDS`.
        model_type: one of transformers' names for the kind.
        reload: loads a folder with a class and runs it on inputs; default: in this process.
    """
    started = time.perf_counter()
    layers, never_called, generates, outside = 0, 0, False, False
    try:
        with _stage(NOT_BUILT, "", lambda: not builds_by_default(kind, model_type)):
            model = build(kind, model_type)
        with _stage(NOT_BUILT, ""):
            make = find_inputs(model)
            batches = [make(seed) for seed in range(BATCHES)]
            outputs(model, batches[0])
        if not any(map(_is_linear, model.base_model.modules())):
            raise _Failure(NOTHING, "no linear layer but its head's", True)
        with _stage(NOT_BUILT, "generate: "):
            generated = _generate(model, batches[0])
        with tempfile.TemporaryDirectory() as folder:
            with _stage(NOT_BUILT, "plain transformers can't save and reload it: ", lambda: True):
                model.save_pretrained(f"{folder}/dense")
                model = type(model).from_pretrained(f"{folder}/dense")
                again = load_and_run(Path(folder) / "dense", type(model), batches[0])
                _require_equal(outputs(model, batches[0]), again)
            for pattern in PATTERNS:
                config = SparseConfig(pattern=pattern, dataset=batches)
                with _stage(FAIL, f"prune {pattern}: "):
                    if pattern == "unstructured":
                        pruned = type(model).from_pretrained(
                            f"{folder}/dense", quantization_config=config
                        )
                        report = pruned.hf_quantizer.report
                    else:
                        pruned, report = model, hf_sparse.prune(model, config)
                    layers = len(report.layers)
                    never_called = sum(UNREACHED in why for why in report.left_dense.values())
                    _check_counts(pruned, report, pattern)
                with _stage(FAIL, f"save and reload {pattern}: "):
                    expected = outputs(pruned, batches[0])
                    pruned.save_pretrained(f"{folder}/{pattern}")
                    check_files(Path(folder) / pattern, report)
                    found = (reload or load_and_run)(
                        Path(folder) / pattern, type(model), batches[0]
                    )
                    _require_equal(expected, found)
                with _stage(FAIL, f"generate {pattern}: "):
                    if generated is not None:
                        _generate(pruned, batches[0], required=True)
                        generates = True
        status, reason = PASS, ""
    except _Failure as failure:
        status, reason, outside = failure.status, str(failure), failure.outside
    seconds = round(time.perf_counter() - started, 1)
    return Outcome(
        kind, model_type, status, reason, outside, layers, never_called, generates, seconds
    )


def builds_by_default(kind: str, model_type: str) -> bool:
    """Can transformers build the type from its own default config?"""
    try:
        with torch.device("meta"):
            _model(kind, default_config(model_type))
    except Exception:
        return False
    return True


def build(kind: str, model_type: str) -> PreTrainedModel:
    """A tiny random model of a type; no weight is zero, so that zeros can be counted."""
    torch.manual_seed(0)
    model = _model(kind, tiny_config(model_type)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def _model(kind: str, config: PreTrainedConfig) -> PreTrainedModel:
    cls = getattr(transformers.models.auto.modeling_auto, KINDS[kind][0])[type(config)]
    cls = cls[0] if isinstance(cls, tuple) else cls
    if not isinstance(config, cls.config_class):
        parts = [getattr(config, name) for name in config.sub_configs]
        config = next((part for part in parts if isinstance(part, cls.config_class)), config)
    if kind == "masked LM" and getattr(config, "is_decoder", False):
        config.is_decoder = False
    model: PreTrainedModel = cls(config)
    return model


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        ones = {*module.kernel_size, *module.stride, module.groups}
        return (
            ones == {1}
            and type(module) in (nn.Conv1d, nn.Conv2d)
            and module.padding[0] in (0, "s", "v")
        )
    return isinstance(module, nn.Linear | Conv1D)


def outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All floating-point tensors that a forward pass gives; some models draw random numbers."""
    torch.manual_seed(0)
    with torch.no_grad():
        result = model(**inputs)
    values = result.to_tuple() if hasattr(result, "to_tuple") else result
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def load_and_run(folder: Path, cls: type, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The outputs of a saved model."""
    return outputs(cls.from_pretrained(folder), inputs)


def expected_zeros(shape: tuple[int, int], pattern: str) -> int:
    """Zeros that half the weights, or 2:4, means for a weight."""
    rows, columns = shape
    if pattern == "unstructured":
        return rows * columns // 2
    tail = columns % 4
    return rows * (columns // 4 * 2 + tail - math.ceil(tail / 2))


def _check_counts(model: PreTrainedModel, report: hf_sparse.PruningReport, pattern: str) -> None:
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        found = int((weight == 0).sum())
        expected = expected_zeros(layer.shape, pattern)
        if not found == layer.zeros == expected:
            raise AssertionError(f"{layer.name} has {found} zeros, expected {expected}")


def check_files(folder: Path, report: hf_sparse.PruningReport) -> None:
    """Count zeros anew, from the files alone: a layer's values are the weights that are left."""
    kept = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            kept |= {name: int(file.get_tensor(name).count_nonzero()) for name in file.keys()}  # noqa: SIM118
    for layer in report.layers:
        found = math.prod(layer.shape) - kept[f"{layer.name}.weight"]
        if found != layer.zeros:
            raise AssertionError(f"{layer.name} is saved with {found} zeros, not {layer.zeros}")


def _require_equal(expected: list[Tensor], found: list[Tensor]) -> None:
    if not expected or not all(bool(torch.isfinite(e).all()) for e in expected[:1]):
        raise AssertionError("its outputs are not finite")
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num()):
            largest = float((a - b).abs().max()) if a.shape == b.shape else math.nan
            raise AssertionError(f"outputs differ after reloading by {largest:.3g}")


def _generate(
    model: PreTrainedModel, inputs: dict[str, Tensor], required: bool = False
) -> Tensor | None:
    """A few tokens; None where the dense model can't, unless it is required."""
    if not model.can_generate():
        return None
    prompt = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
    try:
        with torch.no_grad():
            result: Any = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    except Exception:
        if required:
            raise
        return None
    return result if isinstance(result, Tensor) else None


@contextmanager
def _stage(
    status: str, prefix: str, is_outside: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Turn what is raised into an outcome; a package that transformers lacks is outside anyway."""
    try:
        yield
    except _Failure:
        raise
    except Exception as error:
        outside = isinstance(error, ImportError) or is_outside()
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        message = " ".join(str(error).split())[:400]
        text = f"{prefix}{type(error).__name__}: {message} ({place})"
        raise _Failure(status, text, outside) from error
