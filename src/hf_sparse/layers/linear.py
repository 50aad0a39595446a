"""`SparseLinear`: an `nn.Linear` that holds what is left of its weight, and a low-rank part."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn

from ..core.errors import AdapterError, FormatError
from ..core.low_rank import KEY_A, KEY_B, LowRank
from ..formats import Dense, Format, Quantized, pack_weight
from ..formats.base import Packed, check_packed, packed_bytes
from ..kernels import Choice, Kernel, Stored, Verdict, choose
from ..kernels.reference import sparse_linear
from .axes import Axes
from .written_weight import MERGED, UnpackedWeight, equal_but_rounding

# `weight` itself is a property, so the buffer with the values needs a name of its own.
VALUES = "weight_values"
# Buffers that `train_values` makes parameters of.
_TRAINED = (VALUES, KEY_A, KEY_B)


class SparseLinear(nn.Linear):
    """A linear layer whose weight is packed; takes the place of a `Linear` or a `Conv1D`.

    It is an `nn.Linear` so that PEFT and whatever else asks `isinstance(layer, nn.Linear)` treats
    it as one. `.weight` can be read, at the price of unpacking it. A weight that is written into
    it, as PEFT's own merging does, is held in the same layout if it is 0 where the old one is, and
    else dense, with a warning; writing the old one back, up to rounding, packs it again.

    The weight is either in its stored form, as persistent buffers, or `resolve` has handed it to
    a kernel, whose tensors are then the only ones resident. `state_dict` gives the stored form in
    both cases. A low-rank part is two more buffers that no kernel sees: its product is added.
    `train_values` makes parameters of the stored values and of the low-rank part.

    Args:
        fmt: storage format of the packed tensors.
        packed: the format's tensors, `weight` and companions; meta tensors before loading.
        shape: (out_features, in_features).
        dtype: dtype of `.weight` and of the product's weight. The stored values may be narrower:
            a bf16 checkpoint loaded in fp32 keeps bf16 values, which is exact. Codes and scales of
            a quantised weight are as stored whatever the dtype.
        bias: bias parameter to adopt, shape (out_features,), or None.
        axes: those of the layer that it replaces; a `Conv1D` keeps its weight as (in, out).
        low_rank: B and A beside the packed weight S, for y = x (S + B A)' + b, or None.

    Attributes:
        kernel: what multiplies; None for the reference path.
        trace: which kernels were considered, and what came of it.
    """

    def __init__(
        self,
        fmt: Format,
        packed: Packed,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        axes: Axes = Axes(),  # noqa: B008 - it is frozen
        low_rank: LowRank | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.format = fmt
        self.axes = axes
        self.weight_dtype = dtype
        self.bias = bias  # type: ignore[assignment]
        self.kernel: Kernel | None = None
        self.trace: tuple[Verdict, ...] = ()
        self._before: tuple[Format, Packed, LowRank | None] | None = None
        self._store(packed)
        self.rank = 0
        self._add_low_rank(low_rank)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def packed(self) -> Packed:
        """The stored form by local keys; made anew if a kernel holds the weight."""
        if self.kernel is not None:
            return self.kernel.packed(self.format, self._values_dtype)
        return {key: tensor.detach() for key, tensor in self._stored().items()}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight, unpacked anew at each access; the low-rank part is in it. Of shape
        (out, in), also in place of a `Conv1D`; a convolution's has its axes of size 1 behind.
        What is written into it, or assigned, becomes the layer's."""
        weight = self.matrix.view(self._weight_shape)
        return weight if torch.compiler.is_compiling() else UnpackedWeight.of(weight, self._take)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._take(value)

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return self.shape if self.axes.transposed else self.axes.own_shape(self.shape)

    @property
    def matrix(self) -> Tensor:
        """`weight` as (out, in), a tensor of its own, that no longer belongs to the layer."""
        low_rank = self.low_rank
        return self.sparse_weight if low_rank is None else low_rank.added_to(self.sparse_weight)

    @property
    def sparse_weight(self) -> Tensor:
        """The packed part of the weight alone, shape (out, in), unpacked anew at each access."""
        if self.kernel is not None:
            return self.kernel.weight(self.weight_dtype)
        return self.format.unpack(self._stored(), self.shape, self.weight_dtype)

    @property
    def low_rank(self) -> LowRank | None:
        """The low-rank part, as it is held; None if there is none."""
        return LowRank(getattr(self, KEY_B), getattr(self, KEY_A)) if self.rank else None

    def _add_low_rank(self, low_rank: LowRank | None) -> None:
        if low_rank is not None:
            self.rank = low_rank.rank
            for key, tensor in low_rank.tensors().items():
                self.register_buffer(key, tensor)

    def drop_low_rank(self) -> None:
        """Leave the packed part alone."""
        if self.rank:
            self.rank = 0
            delattr(self, KEY_A)
            delattr(self, KEY_B)

    def _take(self, value: Tensor) -> Tensor | None:
        """Hold a weight that was written from outside, or the old one if that is what it is up to
        rounding: then it is returned.

        Raises:
            AdapterError: the layer's tensors are offloaded, or trained.
            FormatError: the weight has another shape.
        """
        if self.trains_values:
            raise AdapterError(
                "a weight was written into a sparse layer whose values are trained: call "
                "hf_sparse.training.finish_training(model) first"
            )
        if self.is_offloaded():
            raise AdapterError(
                "a weight was written into a sparse layer that is offloaded, where it would be "
                "lost: load the model without offloading to merge an adapter"
            )
        shape = self._weight_shape
        if value.shape != shape:
            raise FormatError(f"the weight has shape {tuple(value.shape)}, expected {shape}")
        value = value.detach().to(self.weight_dtype).as_subclass(Tensor).reshape(self.shape)
        current = self.matrix
        if torch.equal(value, current):
            return None
        before = self._before or (self.format, self.packed, self.low_rank)
        if self._before is not None and equal_but_rounding(value, current, self._old_weight()):
            self.hold(*before)
            return self.matrix.view(shape)
        layout = self.format.layout if isinstance(self.format, Quantized) else self.format
        if self.rank or bool(value[current == 0].any()):
            layout = Dense()
        if layout != self.format:
            lost = "dense" if isinstance(layout, Dense) else "no longer quantised"
            warnings.warn(MERGED.format(lost), stacklevel=3)
        self.hold(layout, pack_weight(layout, value))
        self._before = before
        return None

    def hold(self, fmt: Format, packed: Packed, low_rank: LowRank | None = None) -> None:
        """Hold another weight, of the same shape, and hand it to a kernel if the old one was."""
        resolved = self.kernel is not None
        self.drop_low_rank()
        self.format, self._before = fmt, None
        self._store(packed)
        self._add_low_rank(low_rank)
        if resolved:
            self.resolve()

    def _old_weight(self) -> Tensor:
        """The weight before others were written over it."""
        assert self._before is not None
        fmt, packed, low_rank = self._before
        weight = fmt.unpack(packed, self.shape, self.weight_dtype)
        return weight if low_rank is None else low_rank.added_to(weight)

    def is_offloaded(self) -> bool:
        """Does accelerate keep its tensors elsewhere between calls?"""
        hook = getattr(self, "_hf_hook", None)
        return isinstance(hook, AlignDevicesHook) and bool(hook.offload)

    @staticmethod
    def buffer_name(key: str) -> str:
        """The buffer, and key of `state_dict`, of a format's local key."""
        return VALUES if key == "weight" else key

    def resident_bytes(self) -> int:
        """Bytes that the weight takes in memory now."""
        held = {n: t for n, t in self.named_parameters(recurse=False) if n != "bias"}
        return packed_bytes(dict(self.named_buffers(recurse=False)) | held)

    @property
    def trains_values(self) -> bool:
        """Are the values a parameter?"""
        return VALUES in self._parameters

    def train_values(self, dtype: torch.dtype) -> None:
        """Make the values a parameter, NAME.weight_values, and a low-rank part's factors too.

        The values keep their stored order and shape, so the pattern can't change and the state of
        an optimiser is as small as they are. The reference path multiplies: a kernel's form of
        the weight would be out of date after every step.

        Args:
            dtype: of the parameters, floating-point; what is multiplied has the input's dtype.
        """
        if self.trains_values:
            return
        self._store(self.packed)
        for name in [name for name in _TRAINED if name in self._buffers]:
            values = getattr(self, name).to(dtype, copy=True)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(values))

    def fix_values(self) -> None:
        """Undo `train_values`: values in the weight's dtype, multiplied by a kernel again."""
        for name in [name for name in _TRAINED if name in self._parameters]:
            values = getattr(self, name).detach().to(self.weight_dtype)
            delattr(self, name)
            self.register_buffer(name, values)
        self.resolve()

    def forward(self, input: Tensor) -> Tensor:
        if self.kernel is not None:
            output = self.kernel.linear(input, self.bias)
        else:
            output = sparse_linear(input, self.bias, self.format, self.shape, self._stored())
        if not self.rank:
            return output
        a, b = getattr(self, KEY_A).to(input.dtype), getattr(self, KEY_B).to(input.dtype)
        return output + F.linear(F.linear(input, a), b)

    def resolve(self) -> None:
        """Hand the weight to the kernel that suits it here; its contents have been checked.

        Tensors on meta, or behind an offloading hook, stay as they are.
        """
        if self.kernel is not None or self.trains_values:
            return
        packed = self.packed
        if any(tensor.is_meta for tensor in packed.values()):
            return
        if self.is_offloaded():
            self.trace = (Verdict("reference", True, "its tensors are offloaded"),)
            return
        choice: Choice = choose(Stored(self.format, packed, self.shape, self.weight_dtype))
        self.trace = choice.trace
        if choice.kernel is not None:
            self._values_dtype = packed["weight"].dtype
            self._drop_buffers()
            self.kernel = choice.kernel
            for name, tensor in choice.kernel.tensors().items():
                self.register_buffer(name, tensor, persistent=False)

    def extra_repr(self) -> str:
        parameters = "".join(f", {k}={v}" for k, v in self.format.parameters().items())
        low_rank = f", low_rank={self.rank}" if self.rank else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format.name}{parameters}{low_rank}, "
            f"kernel={'reference' if self.kernel is None else self.kernel.name}"
        )

    def _store(self, packed: Packed) -> None:
        """Hold the stored form; the reference path multiplies until `resolve`."""
        self._drop_buffers()
        self.kernel = None
        self.trace = (Verdict("reference", True, "not resolved yet"),)
        self._keys = tuple(packed)
        for key, tensor in packed.items():
            self.register_buffer(self.buffer_name(key), tensor)

    def _stored(self) -> Packed:
        """The stored form as it is held: values that are trained have a gradient."""
        names = {key: self.buffer_name(key) for key in self._keys}
        return {key: getattr(self, name) for key, name in names.items()}

    def _drop_buffers(self) -> None:
        for name in set(self._buffers) - {KEY_A, KEY_B}:
            delattr(self, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to()`, `.half()`, ...: the dtype of `.weight` follows as a parameter's would."""
        resolved = self.kernel is not None
        self._before = None  # on another device, or rounded, it would not be found again
        if resolved:
            self._store(self.packed)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        super()._apply(self._keep_fixed(fn), recurse)  # type: ignore[no-untyped-call]
        if resolved:
            self.resolve()
        return self

    def _keep_fixed(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`fn` that moves floats whose dtype the format prescribes, such as scales, as integers."""
        specs = self.format.specs(self.shape)
        packed = self._stored().items()
        fixed = {id(t) for key, t in packed if specs[key].dtype == t.dtype == torch.bfloat16}

        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) in fixed:
                return fn(tensor.view(torch.int16)).view(torch.bfloat16)
            return fn(tensor)

        return keep

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            for key, tensor in self.packed.items():
                # A GPU that holds the kernels' form may have no room for the stored one beside it.
                destination[prefix + self.buffer_name(key)] = tensor.cpu()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the stored form and check it before a kernel sees it.

        The values may have their name in files, too: Trainer loads a checkpoint's tensors as they
        are.
        """
        resolved = self.kernel is not None
        if resolved:
            self._store(self.packed)
        if prefix + "weight" in state_dict:
            state_dict.setdefault(prefix + VALUES, state_dict.pop(prefix + "weight"))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not any(tensor.is_meta for tensor in self.packed.values()):
            check_packed(self.format, self.packed, self.shape)
            if (low_rank := self.low_rank) is not None:
                low_rank.check(self.shape)
        if resolved:
            self.resolve()


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The sparse layers of a model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
