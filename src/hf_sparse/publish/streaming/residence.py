"""A model whose blocks are in memory while a run is at work on them, and else in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...checkpoint.state_dict import sparse_state_dict
from ...config.sparse_config import SparseConfig
from ...core.data_record import DataRecord
from ...core.errors import ConfigError
from ...layers import SparseLinear, sparse_layers
from ...layers.blocks import Block
from ...layers.experts import SparseExperts, expert_tensors, fuse
from ...pruning.residence import FinishedBlock, Residence
from .ledger import Ledger, PackedBlock
from .source import SourceWeights

# Bytes: an embedding or a layer outside the blocks that has more is read when it is called.
LARGE = 16 << 20


class Streamed(Residence):
    """Reads a block when it is at work or called, and writes it when it is pruned.

    Args:
        source: the dense checkpoint.
        ledger: where finished blocks go.
        waiting: a folder for activations that wait; None to hold them in memory.
    """

    def __init__(self, source: SourceWeights, ledger: Ledger, waiting: Path | None) -> None:
        self._source, self._ledger, self._waiting = source, ledger, waiting
        self._model: PreTrainedModel
        self._loaded: dict[nn.Module, list[tuple[nn.Module, str, Any]]] = {}

    def begin(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        config: SparseConfig,
        record: DataRecord | None,
    ) -> None:
        assert isinstance(model, PreTrainedModel)
        self._model = model
        _check_apart(blocks)
        settings = (config.replaced(dataset=record) if record else config).to_dict()
        self.finished = self._ledger.begin(settings)
        self.activations = self._ledger.activations(self._waiting)
        inside = {m for block in blocks for m in block.module.modules()}
        units = {block.name: block.module for block in blocks} | _large(model, inside)
        rest = [n for n in self._source.expected if not _within(n, units)]
        self._fill(model, "", [name for name in rest if self._source.has(name)])
        for name, module in units.items():
            module.forward = _on_demand(module, partial(self._at_hand, name, module))

    @contextmanager
    def at_work(self, block: Block) -> Iterator[None]:
        with self._at_hand(block.name, block.module):
            yield
            for sparse in sparse_layers(self._model.get_submodule(block.name)).values():
                _empty(sparse)

    def finish(self, block: Block, done: FinishedBlock) -> None:
        model, prefix = self._model, f"{block.name}."
        for experts in _experts(model.get_submodule(block.name)):
            if not any(isinstance(m, SparseLinear) for m in experts.modules()):
                fuse(model, experts)
        module = model.get_submodule(block.name)
        state, described = sparse_state_dict(module, prefix)
        own = {name: _own(tensor) for name, tensor in state.items()}
        self._ledger.finish(PackedBlock(block.name, own, described, done))

    def outside(self, name: str) -> Tensor:
        """A tensor that is in no block, as the result has it."""
        parent, _, local = name.rpartition(".")
        held: Tensor = getattr(self._model.get_submodule(parent), local)
        return self._source.read([name])[name] if held.is_meta else held.detach()

    @contextmanager
    def _at_hand(self, name: str, module: nn.Module) -> Iterator[None]:
        if module in self._loaded:
            yield
            return
        self._loaded[module] = self._fill(module, name, self._source.inside(name))
        try:
            yield
        finally:
            for owner, local, meta in self._loaded.pop(module):
                _put(owner, local, meta)

    def _fill(
        self, module: nn.Module, name: str, wanted: Sequence[str]
    ) -> list[tuple[nn.Module, str, Any]]:
        """Read tensors into a module; what it held in their places, to be put back."""
        prefix = f"{name}." if name else ""
        tensors = {n.removeprefix(prefix): t for n, t in self._source.read(wanted).items()}
        for place, experts in [(n, m) for n, m in module.named_modules() if _is_experts(m)]:
            start = f"{place}." if place else ""
            fused = {k: tensors.pop(k) for k in list(tensors) if k.startswith(start)}
            if not fused:
                continue
            parts = expert_tensors(experts, {k.removeprefix(start): t for k, t in fused.items()})
            tensors |= {start + key: tensor for key, tensor in parts.items()}
        before = []
        for key, tensor in tensors.items():
            parent, _, local = key.rpartition(".")
            owner = module.get_submodule(parent)
            before.append((owner, local, _held(owner, local)))
            _put(owner, local, tensor)
        return before


def _is_experts(module: nn.Module) -> bool:
    return isinstance(module, SparseExperts)


def _experts(module: nn.Module) -> list[SparseExperts]:
    return [m for m in module.modules() if isinstance(m, SparseExperts)]


def _check_apart(blocks: Sequence[Block]) -> None:
    """Raise a ConfigError if a block is inside another: neither could be read by itself."""
    names = {block.name for block in blocks}
    for name in names:
        outer = next((o for o in names if name.startswith(f"{o}.")), None)
        if outer is not None:
            raise ConfigError(
                f"{name} is pruned by itself, but is part of the block {outer}: from disk to disk "
                f"blocks are read one by one. Leave it dense with modules_to_not_convert=[{name!r}]"
            )


def _large(model: nn.Module, inside: set[nn.Module]) -> dict[str, nn.Module]:
    """Embeddings and layers outside the blocks, such as the head, that aren't kept in memory."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Embedding, nn.Linear)
        and module not in inside
        and module.weight.nbytes >= LARGE  # type: ignore[operator,union-attr]
    }


def _within(name: str, units: dict[str, nn.Module]) -> bool:
    places = [i for i, letter in enumerate(name) if letter == "."]
    return any(name[:i] in units for i in places)


def _on_demand(module: nn.Module, at_hand: Callable[[], Any]) -> Callable[..., Any]:
    """The module's forward, with its weights in memory while it runs."""
    forward = module.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with at_hand():
            return forward(*args, **kwargs)

    return run


def _held(owner: nn.Module, local: str) -> Any:
    return owner._parameters[local] if local in owner._parameters else owner._buffers[local]


def _put(owner: nn.Module, local: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer."""
    if local not in owner._parameters:
        owner._buffers[local] = tensor
        return
    before = owner._parameters[local]
    ready = isinstance(tensor, nn.Parameter)
    flag = bool(before is not None and before.requires_grad)
    owner._parameters[local] = tensor if ready else nn.Parameter(tensor, flag)  # type: ignore[assignment]


def _empty(sparse: SparseLinear) -> None:
    """Leave a sparse layer without contents: they are in a file."""
    sparse.hold(sparse.stored.on_meta())
    if sparse.bias is not None:
        sparse.bias = nn.Parameter(sparse.bias.detach().to("meta"), sparse.bias.requires_grad)


def _own(tensor: Tensor) -> Tensor:
    """The tensor, with memory of its own, as the file's writer wants it."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
