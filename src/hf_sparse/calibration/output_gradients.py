"""The output metric of every layer: how much the model's own loss feels an error in its outputs.

G = E[d d'] is the Fisher information of a layer's outputs (K-FAC, Martens & Grosse 2015): d is the
gradient of the negative log-likelihood of a label that is drawn from the model itself. Where the
model gives logits of two classes or more the label is a class; otherwise its outputs are the means
of block normals.

One backward pass per batch runs through the dense model. Each block's activations are computed
again when the backward pass reaches it, so that only hidden states between blocks are held.
Of each layer G's diagonal is kept, and G itself up to ROWS outputs, else a random sketch of it
with ROWS rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.errors import CalibrationError
from ..core.logging import progress_bar
from ..core.precision import full_precision
from ..core.statistics import OutputMetric
from ..layers.axes import Axes
from ..layers.blocks import Block
from .batches import Batch
from .forward import call_model, plain_outputs
from .hooks import hooked
from .residual_stream import stream_input
from .token_masks import token_mask

# Of the calibration batches; the gradients' second moments settle early.
SHARE = 0.125
ROWS = 256


def collect_metrics(
    model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], seed: int
) -> dict[str, OutputMetric]:
    """The output metric of the blocks' targets, by name; those that no gradient reaches have none.

    Args:
        model: dense, in eval mode.
        blocks: from `find_blocks`; their insides are recomputed in the backward pass.
        batches: calibration batches; an evenly spaced SHARE of them is used.
        seed: of the labels and sketches.

    Raises:
        CalibrationError: the model gives no gradient, or one isn't finite.
    """
    layers = {name: model.get_submodule(name) for block in blocks for name in block.targets}
    sums: dict[str, _Sums] = {}
    generator = torch.Generator("cpu").manual_seed(seed)
    used = batches[:: round(1 / SHARE)]
    with ExitStack() as stack, progress_bar(len(used), "Gradients") as bar:
        stack.enter_context(_frozen(model))
        stack.enter_context(plain_outputs(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_recomputed(blocks))
        stack.enter_context(_watched(layers, sums, generator))
        for batch in used:
            _backward(model, batch, generator)
            bar.update()
    tokens = sum(int(batch["input_ids"].numel()) if "input_ids" in batch else 1 for batch in used)
    return {name: found.finish(name, tokens) for name, found in sums.items() if found.reached()}


class _Sums:
    """What is added up of one layer's output gradients."""

    def __init__(self, outputs: int, device: torch.device, generator: torch.Generator) -> None:
        self._generator = generator
        self._exact = outputs <= ROWS
        self._diagonal = torch.zeros(outputs, device=device)
        self._moments = torch.zeros(outputs if self._exact else ROWS, outputs, device=device)

    @full_precision()
    def add(self, gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1]).float()
        self._diagonal += rows.square().sum(dim=0)
        if self._exact:
            self._moments.addmm_(rows.T, rows)
        else:
            size = ROWS, len(rows)
            signs = torch.randint(2, size, generator=self._generator, device="cpu")
            signs = (2 * signs - 1).to(rows) / ROWS**0.5
            self._moments.addmm_(signs, rows)

    def reached(self) -> bool:
        return bool(self._diagonal.any())

    def finish(self, name: str, tokens: int) -> OutputMetric:
        if not bool(torch.isfinite(self._diagonal).all()):
            raise CalibrationError(f"layer {name}: the gradients of its outputs are not finite")
        diagonal = self._diagonal / tokens
        if self._exact:
            return OutputMetric(diagonal, gram=self._moments / tokens)
        return OutputMetric(diagonal, sketch=self._moments / tokens**0.5)


def _backward(model: nn.Module, batch: Batch, generator: torch.Generator) -> None:
    """Draw labels from the model for one batch and send their gradient through it."""
    output = call_model(model, batch)
    # An encoder-decoder's logits are its decoder's.
    decodes = "decoder_input_ids" in batch
    mask = token_mask(batch.get("decoder_attention_mask" if decodes else "attention_mask"))
    scores, gradients = [], []
    for values, gradient in _label_gradients(output, generator):
        if mask is not None and mask.shape == values.shape[:-1]:
            gradient = gradient * mask.to(gradient).unsqueeze(-1)
        if values.grad_fn is not None:
            scores.append(values)
            gradients.append(gradient)
    if not scores:
        raise CalibrationError(
            f"{type(model).__name__} gives no gradient: metric and allocation 'fisher' need one"
        )
    torch.autograd.backward(scores, gradients)


@torch.no_grad()
def _label_gradients(output: Any, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """What the model predicts with, and the gradient of -log p(label) in it."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.shape[-1] > 1:
        shares = logits.detach().float().softmax(dim=-1)
        flat = shares.reshape(-1, shares.shape[-1])
        if not bool(torch.isfinite(flat).all()):
            raise CalibrationError("the model's logits are NaN or infinite on the calibration data")
        labels = torch.multinomial(flat.cpu(), 1, generator=generator).to(flat.device)
        drawn = torch.zeros_like(flat).scatter_(1, labels, 1)
        yield logits, (flat - drawn).view_as(logits).to(logits.dtype)
        return
    if isinstance(output, Tensor):
        output = (output,)
    for values in output if isinstance(output, (tuple, list)) else output.values():
        # A scalar is a loss.
        if isinstance(values, Tensor) and values.is_floating_point() and values.ndim:
            noise = torch.randn(values.shape, generator=generator, device="cpu")
            yield values, noise.to(values)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for parameters: only those of activations are wanted."""
    # By name: where accelerate offloads, parameters are replaced by others while the model runs.
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for name, flag in before.items():
            model.get_parameter(name).requires_grad_(flag)


@contextmanager
def _recomputed(blocks: Sequence[Block]) -> Iterator[None]:
    """Blocks keep only their inputs for the backward pass; these take gradients."""
    before = {block.module: block.module.__dict__.get("forward") for block in blocks}
    hooks = (m.register_forward_pre_hook(_take_gradients, with_kwargs=True) for m in before)
    with hooked(hooks):
        try:
            for module in before:
                module.forward = _checkpointed(module.forward)  # type: ignore[method-assign]
            yield
        finally:
            for module, forward in before.items():
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _take_gradients(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The graph begins at the first block of each stack: embeddings before it are constants."""
    stream = stream_input(args, kwargs)
    if stream is None or stream.requires_grad:
        return None
    start = stream.detach().requires_grad_().clone()

    def begin(value: Any) -> Any:
        return start if value is stream else value

    return tuple(begin(v) for v in args), {k: begin(v) for k, v in kwargs.items()}


@contextmanager
def _watched(
    layers: Mapping[str, nn.Module], sums: dict[str, _Sums], generator: torch.Generator
) -> Iterator[None]:
    """Add up the gradients of the layers' outputs; recomputed outputs have none of their own."""

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad or torch._C._current_graph_task_id() != -1:
            return
        axes = Axes.of(module)
        if name not in sums:
            outputs = axes.channels_last(output).shape[-1]
            sums[name] = _Sums(outputs, output.device, generator)
        add = sums[name].add
        output.register_hook(lambda gradient: add(axes.channels_last(gradient)))  # type: ignore[no-untyped-call]

    with hooked(m.register_forward_hook(partial(watch, name)) for name, m in layers.items()):
        yield
