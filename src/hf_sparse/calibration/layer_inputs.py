"""The inputs of a block's layers: recorded while the block runs, one pass at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..layers.axes import Axes
from .expert_routing import ExpertRouting
from .hooks import hooked
from .padding import Padding
from .passes import Call
from .residual_stream import ResidualStream


@dataclass
class LayerInputs:
    """What one pass through a block hands to its layers, without padding.

    Attributes:
        rows: each layer's inputs, (tokens, in), in the order of its calls; layers that were handed
            the same tensor have the same object here.
        tokens: of experts' layers, the numbers of the tokens at each call.
        streams: the residual stream before each layer that writes to it, (tokens, width).
    """

    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)

    def calls(self) -> int:
        """Of all layers together."""
        return sum(len(rows) for rows in self.rows.values())

    def groups(self, names: list[str]) -> list[list[str]]:
        """Layers split by what they were handed."""
        parts: dict[tuple[int, ...], list[str]] = {}
        for name in names:
            parts.setdefault(tuple(id(x) for x in self.rows.get(name, ())), []).append(name)
        return list(parts.values())


class _AllSeen(Exception):  # noqa: N818 - a signal, no error
    """Every layer of the block has had its input: the rest of the pass would be wasted."""


class InputRecorder:
    """Keeps what a block's layers are handed.

    Args:
        layers: the layers to watch; inputs are (..., in), a convolution's have the channels where
            it has them.
        routing: of the block's experts.
        stream: the block's residual stream.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], routing: ExpertRouting, stream: ResidualStream
    ) -> None:
        self._names = {module: name for name, module in layers.items()}
        self._routing, self._stream = routing, stream
        self._begin(Padding(), until_all_seen=False)

    def _begin(self, padding: Padding, until_all_seen: bool) -> None:
        self._found = LayerInputs()
        self._padding, self._until_all_seen = padding, until_all_seen
        self._rows_of: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts `record` can be called."""
        hooks = (m.register_forward_pre_hook(self._see, prepend=True) for m in self._names)
        with self._routing.followed(self._tokens), hooked(hooks), self._stream.followed():
            yield

    def record(
        self, call: Call, run: Callable[[], Any], until_all_seen: bool = False
    ) -> LayerInputs:
        """The inputs of one pass.

        Args:
            call: of the block.
            run: runs it.
            until_all_seen: break the pass off once as many inputs were seen as there are layers.
        """
        self._begin(call.padding, until_all_seen)
        self._stream.start(call)
        with suppress(_AllSeen):
            run()
        found = self._found
        self._begin(Padding(), until_all_seen=False)
        return found

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._routing.is_counted(module):
            return
        name, x, found = self._names[module], args[0], self._found
        routed = self._routing.routed(module, self._padding)
        if routed is not None:
            if not len(routed.tokens):
                return  # padding alone
            found.tokens.setdefault(name, []).append(routed.tokens)
        axes = Axes.of(module)
        seen = id(x), axes.spatial
        if seen not in self._rows_of:
            if self._routing.beside:
                rows = x.detach()  # no padding among them
            elif routed is None:
                rows = self._tokens(module, axes.channels_last(x))
            else:
                rows = x.detach()[routed.rows]
            # A copy: the model may write into its activations before the pass is counted.
            self._rows_of[seen] = x, rows.clone()
        found.rows.setdefault(name, []).append(self._rows_of[seen][1])
        stream = self._stream.before(name)
        if stream is not None:
            found.streams[name] = self._tokens(module, axes.channels_last(stream))
        if self._until_all_seen and found.calls() == len(self._names):
            raise _AllSeen

    def _tokens(self, module: nn.Module, x: Tensor) -> Tensor:
        """The rows of a module's input that are no padding, (tokens, in)."""
        rows = x.detach().reshape(-1, x.shape[-1])
        mask = self._padding.tokens(module, len(rows))
        return rows if mask is None else rows[mask.to(rows.device)]
