"""`PackedModule`: a module that holds a packed weight, and how it is moved, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn

from ..core.errors import FormatError, TrainingError
from ..core.input_threshold import InputThreshold
from ..core.low_rank import KEY_A, KEY_B, LowRank
from ..formats import Format
from ..formats.base import Packed, check_packed, packed_bytes
from ..kernels import Form, Kernel, Verdict, choose
from ..kernels import Stored as StoredWeight
from .held import VALUES, Held, PackedWeight, Resolved, Stored, Trained, Unchecked, buffer_name


class PackedModule(nn.Module):
    """Holds a packed weight in one of the three ways of `held`, and a bias.

    The weight is either in its stored form, as persistent buffers, or `resolve` has handed it to
    a kernel, whose tensors are then the only ones resident. `state_dict` gives the stored form in
    both cases. A low-rank part is two more buffers that no kernel sees: its product is added.
    `train_values` makes parameters of the stored values and of the low-rank part.

    Attributes:
        shape: (out_features, in_features).
        format: storage format.
        rank: of the low-rank part; 0 if there is none.
        weight_dtype: of the dense weight; that of the values may be narrower.
        trace: which kernels were considered, and what came of it.
        form: the one that is wanted of a kernel.
        threshold: up to where the inputs count as 0; None if all count.
        activations: "int8" if a kernel may round its inputs to that, else None.
        written_over: the weight that was held before another one was written into the layer.
    """

    shape: tuple[int, int]
    weight_dtype: torch.dtype
    format: Format
    rank: int
    trace: tuple[Verdict, ...]
    form: Form = "any"
    activations: str | None = None
    threshold: InputThreshold | None = None
    written_over: PackedWeight | None
    _held: Held

    @property
    def kernel(self) -> Kernel | None:
        """What multiplies; None for the reference path."""
        return self._held.kernel

    @property
    def packed(self) -> Packed:
        """The stored form by local keys; made anew if a kernel holds the weight."""
        return self._held.packed(self)

    @property
    def stored(self) -> PackedWeight:
        """All that is stored of the weight."""
        return PackedWeight(self.format, self.packed, self.low_rank)

    @property
    def low_rank(self) -> LowRank | None:
        """The low-rank part, as it is held; None if there is none."""
        return LowRank(getattr(self, KEY_B), getattr(self, KEY_A)) if self.rank else None

    @property
    def sparse_weight(self) -> Tensor:
        """S of the weight S + B A alone, (out, in), unpacked anew at each access."""
        return self._held.dense(self, self.weight_dtype)

    def is_offloaded(self) -> bool:
        """Does accelerate keep its tensors elsewhere between calls?"""
        hook = getattr(self, "_hf_hook", None)
        return isinstance(hook, AlignDevicesHook) and bool(hook.offload)

    def resident_bytes(self) -> int:
        """Bytes that the weight takes in memory now."""
        held = {n: t for n, t in self.named_parameters(recurse=False) if n != "bias"}
        return packed_bytes(dict(self.named_buffers(recurse=False)) | held)

    def hold(self, weight: PackedWeight) -> None:
        """Hold a weight, of the same shape, in its stored form until `resolve`."""
        self.format, self.written_over = weight.format, None
        self.trace = (Verdict("reference", True, "not resolved yet"),)
        self._enter(Stored(weight.packed), weight.named_tensors(), weight.low_rank)

    def distrust(self, check: Callable[[], None]) -> None:
        """Have `check` called before anything is computed of the stored form, until `trust`."""
        self._held = Unchecked(self.packed, check)

    def trust(self) -> None:
        """The contents have been checked."""
        self._held = Stored(self.packed)

    def resolve(self) -> None:
        """Hand the weight to the kernel that suits it here; its contents have been checked.

        Tensors on meta, behind an offloading hook or in training stay as they are.
        """
        if self.kernel is not None or self.trains_values:
            return
        if self.is_offloaded():
            self.trace = (Verdict("reference", True, "its tensors are offloaded"),)
            return
        packed = self.packed
        if any(tensor.is_meta for tensor in packed.values()):
            return
        choice = choose(_for_kernels(self, packed))
        self.trace = choice.trace
        if choice.kernel is not None:
            self.use(choice.kernel)

    def use(self, kernel: Kernel) -> None:
        """Let a kernel that has taken the weight over multiply."""
        held = Resolved(kernel, self.packed["weight"].dtype)
        self._enter(held, kernel.tensors(), self.low_rank)

    @property
    def trains_values(self) -> bool:
        """Are the values a parameter?"""
        return isinstance(self._held, Trained)

    def train_values(self, dtype: torch.dtype) -> None:
        """Make the values a parameter, NAME.weight_values, and a low-rank part's factors too.

        The values keep their stored order and shape, so the pattern can't change and the state of
        an optimiser is as small as they are. The reference path multiplies: a kernel's form of
        the weight would be out of date after every step.

        Args:
            dtype: of the parameters, floating-point; what is multiplied has the input's dtype.
        """
        if not self.trains_values:
            self.hold(self.stored.to(dtype))
            self._enter(Trained(self.packed), self.stored.named_tensors(), self.low_rank)

    def fix_values(self) -> None:
        """Undo `train_values`: values in the weight's dtype, multiplied by a kernel again."""
        if self.trains_values:
            self.hold(self.stored.to(self.weight_dtype))
        self.resolve()

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As in `nn.Module`; values that are fixed can't be trained, which is an error."""
        if requires_grad and not self.trains_values:
            raise TrainingError(
                "the kept values of a sparse layer are fixed: call "
                "hf_sparse.training.prepare_for_training(model) to make parameters of them, or "
                "layer.bias.requires_grad_() for the bias alone"
            )
        return super().requires_grad_(requires_grad)

    def drop_low_rank(self) -> None:
        """Leave the packed part alone."""
        if self.rank:
            self.rank = 0
            delattr(self, KEY_A)
            delattr(self, KEY_B)

    def _enter(self, held: Held, tensors: Mapping[str, Tensor], low_rank: LowRank | None) -> None:
        """Hold the weight another way, in these tensors and no others."""
        for name in [n for n in (*self._parameters, *self._buffers) if n != "bias"]:
            delattr(self, name)
        self._held, self.rank = held, 0 if low_rank is None else low_rank.rank
        factors = {} if low_rank is None else low_rank.tensors()
        for name, tensor in {**tensors, **factors}.items():
            held.register(self, name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to()`, `.half()`, ...: the dtype of `.weight` follows as a parameter's would.

        Floats whose dtype the format prescribes, such as scales, are moved as integers, which no
        cast changes.
        """
        resolved = self.kernel is not None
        self.written_over = None  # on another device, or rounded, it would not be found again
        if resolved:
            self.hold(self.stored)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device="cpu")).dtype
        specs, packed = self.format.specs(self.shape), self.packed
        fixed = [k for k, t in packed.items() if specs[k].dtype == t.dtype == torch.bfloat16]
        for key in fixed:
            self._buffers[key] = packed[key].view(torch.int16)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for key in fixed:
                self._buffers[key] = self.get_buffer(key).view(torch.bfloat16)
        if resolved and _has_contents(self):
            self.resolve()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._save_to_state_dict(destination, prefix, *args)
        if self.kernel is not None:
            for key, tensor in self.packed.items():
                # A GPU that holds the kernels' form may have no room for the stored one beside it.
                destination[prefix + buffer_name(key)] = tensor.cpu()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the stored form and check it before a kernel sees it.

        Trainer loads a checkpoint's tensors as they are: values may have their name in files.
        """
        if self.kernel is not None:
            self.hold(self.stored)
        if prefix + "weight" in state_dict:
            state_dict.setdefault(prefix + VALUES, state_dict.pop(prefix + "weight"))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not any(tensor.is_meta for tensor in self.packed.values()):
            check_packed(self.format, self.packed, self.shape)
            if (low_rank := self.low_rank) is not None:
                low_rank.check(self.shape)
            self.resolve()


def _for_kernels(layer: PackedModule, packed: Packed) -> StoredWeight:
    """What kernels choose by."""
    zeros = 0.0 if layer.threshold is None else layer.threshold.share
    wanted = layer.weight_dtype, layer.form, layer.activations, zeros
    return StoredWeight(layer.format, packed, layer.shape, *wanted)


def _has_contents(layer: PackedModule) -> bool:
    """Do its tensors agree with each other? After `to_empty` they don't."""
    if not any(tensor.is_meta for tensor in layer.packed.values()):
        try:
            check_packed(layer.format, layer.packed, layer.shape)
        except FormatError as error:
            layer.trace = (Verdict("reference", True, f"waits for its contents: {error}"),)
            return False
    return True
