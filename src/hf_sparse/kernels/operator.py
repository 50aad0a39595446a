"""Products with a packed weight as torch operators, made from a description of the weight.

An operator takes x and, behind it, the tensors and numbers of the weight. It brings its shapes
(the fake implementation) and its gradient, so that compilers and tracers see one node. The gradient
of x W' is x W, an operator too, and each is the other's gradient: derivatives of any order exist.
W is constant; a bias is added outside, where it trains. `torch.func` and forward-mode derivatives,
of which torch's custom operators know nothing, go through an autograd function of the same two.

Where nothing watches, a call goes straight to the kernel: torch's dispatcher would add more to a
small layer than its product takes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..core.recording import transformed

INPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

W = TypeVar("W")


class AliveWeights(Generic[W]):
    """Checked weights by the tensors and numbers that describe them, for as long as they live.

    Args:
        check: makes a weight of operands that belong to none, as those of a program that was
            exported and loaded again; raises if they are no valid one. So no tensor that a file or
            a caller brings reaches a kernel unchecked.
    """

    def __init__(self, check: Callable[..., W]) -> None:
        self._check = check
        self._weights: weakref.WeakValueDictionary[tuple[Any, ...], W] = (
            weakref.WeakValueDictionary()
        )

    def add(self, weight: W, operands: Iterable[Any]) -> None:
        """Let a weight be found by its operands."""
        self._weights[_key(operands)] = weight

    def find(self, *operands: Any) -> W:
        """The weight that these very tensors and numbers belong to, or one that `check` makes."""
        known = self._weights.get(_key(operands))
        return self._check(*operands) if known is None else known


def _key(operands: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(
        (each.data_ptr(), each.dtype, each.shape, each.stride())
        if isinstance(each, Tensor)
        else tuple(each)
        if isinstance(each, list)
        else each
        for each in operands
    )


def define(
    name: str,
    operands: str,
    sizes: Callable[..., tuple[int, int]],
    run: Callable[..., Tensor],
    gradient: Callable[..., Tensor],
    weight_gradient: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> CustomOpDef:
    """The operator `hf_sparse::name`, x [..., columns] and *weight to [..., rows] in x's dtype.

    Args:
        name: of the operator.
        operands: what stands for the weight behind x, as a torch schema has it.
        sizes: (columns, rows), of *weight.
        run: the product, of x, *weight; x has been checked.
        gradient: of x, from the result's: of grad, *weight.
        weight_gradient: of the first operand, from the result's and x; None: weights are constant.
    """

    def checked(x: Tensor, *weight: Any) -> Tensor:
        check_input(x, sizes(*weight)[0], weight)
        return run(x, *weight)

    def shapes(x: Tensor, *weight: Any) -> Tensor:
        columns, rows = sizes(*weight)
        check_input(x, columns, weight)
        return x.new_empty((*x.shape[:-1], rows))

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *weight = inputs
        kept = None if weight_gradient is None else x
        tensors = [each if isinstance(each, Tensor) else None for each in weight]
        ctx.save_for_backward(kept, *tensors)
        ctx.numbers = [None if isinstance(each, Tensor) else each for each in weight]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        pairs = zip(tensors, ctx.numbers, strict=True)
        weight = [number if tensor is None else tensor for tensor, number in pairs]
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * (1 + len(weight))
        if needs_x:
            grads[0] = gradient(grad.contiguous(), *weight)
        if needs_weight and weight_gradient is not None:
            grads[1] = weight_gradient(grad, x)
        return tuple(grads)

    schema = f"(Tensor x, {operands}) -> Tensor"
    op = torch.library.custom_op(f"hf_sparse::{name}", checked, mutates_args=(), schema=schema)
    op.register_fake(shapes)
    op.register_autograd(backward, setup_context=save)
    return op


def define_product(
    name: str,
    operands: str,
    shape: Callable[..., tuple[int, int]],
    check: Callable[..., W],
    product: Callable[[Tensor, W], Tensor],
    transposed: Callable[[Tensor, W], Tensor],
) -> tuple[tuple[CustomOpDef, CustomOpDef], AliveWeights[W]]:
    """`hf_sparse::name`, x W' for x [..., in], and `hf_sparse::name_grad`, x W for x [..., out];
    and where they find their weights.

    Args:
        name, operands: see `define`.
        shape: (out, in), of *weight.
        check: see `AliveWeights`.
        product, transposed: x W' and x W, of x and a weight that was found or checked.
    """
    alive = AliveWeights(check)
    forward = define(
        name,
        operands,
        lambda *weight: shape(*weight)[::-1],
        lambda x, *weight: product(x, alive.find(*weight)),
        lambda grad, *weight: backward(grad, *weight),
    )
    backward = define(
        f"{name}_grad",
        operands,
        shape,
        lambda x, *weight: transposed(x, alive.find(*weight)),
        lambda grad, *weight: forward(grad, *weight),
    )
    return (forward, backward), alive


def check_input(x: Tensor, columns: int, weight: Iterable[Any] = ()) -> None:
    """Is x a dense floating-point tensor [..., columns] on the weight's device?

    Raises:
        TypeError, ValueError: it isn't; says what was found and what was expected.
    """
    if x.dtype not in INPUTS:
        expected = ", ".join(map(str, INPUTS))
        raise TypeError(f"x is {x.dtype}, expected one of {expected}")
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {columns})")
    for each in (x, *weight):
        if not isinstance(each, Tensor):
            continue
        if each.layout is not torch.strided:
            raise TypeError(f"a tensor's layout is {each.layout}, expected {torch.strided}")
        if each.device != x.device:
            raise ValueError(
                f"the input is on {x.device}, the sparse weight on {each.device}: move one of "
                "them; in place of nn.DataParallel start a process for each GPU"
            )


def recorded(x: Tensor) -> bool:
    """Does a tracer, an export or a transform go by what is computed, whatever x holds? A compiler
    that may break its graph where it depends on x does not."""
    return (
        torch.compiler.is_exporting()
        or torch._C._is_tracing()
        or transformed()
        or (
            not torch.compiler.is_compiling()
            and (isinstance(x, FakeTensor) or get_proxy_mode() is not None)
        )
    )


def unwatched(x: Tensor, bias: Tensor | None) -> bool:
    """Does nothing record or change what is computed with these tensors: no autograd, compiler,
    tracer, transform, mode or subclass? Asked at every product: as short as it can be."""
    return (
        not torch.compiler.is_compiling()
        and not _tracing()
        and not _dispatch_modes()
        and _transforms() is None
        and forward_ad._current_level < 0
        and type(x) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
        and not (_records() and (x.requires_grad or (bias is not None and bias.requires_grad)))
    )


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_tracing, _dispatch_modes = torch._C._is_tracing, torch._C._len_torch_dispatch_stack
_transforms, _records = torch._C._functorch.peek_interpreter_stack, torch.is_grad_enabled


class _LinearMap(torch.autograd.Function):
    """The first operator of a pair as a linear map, whose transpose is the second."""

    @staticmethod
    def forward(x: Tensor, pair: tuple[CustomOpDef, CustomOpDef], *weight: Any) -> Tensor:
        y: Tensor = pair[0](x, *weight)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.pair, *ctx.weight = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = apply(grads[0], ctx.pair[::-1], *ctx.weight)
        return grad, *(None for _ in range(1 + len(ctx.weight)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return apply(tangents[0], ctx.pair, *ctx.weight)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        return apply(x.movedim(dims[0], 0), *rest), 0


def apply(x: Tensor, pair: tuple[CustomOpDef, CustomOpDef], *weight: Any) -> Tensor:
    """`pair[0]` of x and a weight, differentiable by `torch.func` and forwards too."""
    y: Tensor = _LinearMap.apply(x, pair, *weight)  # type: ignore[no-untyped-call]
    return y
