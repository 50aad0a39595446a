"""Calls of the package's operators with arguments that nothing promises anything about.

Each call must give what F.linear of the decoded weight gives, or an error that says what is wrong.

    python tests/helpers/hostile_calls.py [CALLS] [LIBRARY]

makes that many and prints outcomes by class; LIBRARY is a `_tiles.so` in place of the package's, as
tests/native/sanitize.sh builds one with sanitizers.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.core.grids import Grid
from hf_sparse.formats import Bitmask, Quantized
from hf_sparse.kernels import Stored, choose
from hf_sparse.kernels.codes import more_than_8_bits
from hf_sparse.kernels.cpu import library
from hf_sparse.kernels.cpu.columns.kernel import ColumnKernel
from hf_sparse.kernels.cpu.dense_row import dense_row
from hf_sparse.kernels.gpu.kernel import SlicedKernel
from hf_sparse.kernels.gpu.semi_structured import SemiStructuredKernel

os.environ["HF_SPARSE_MEASURE"] = "0"  # no weight is left to the dense kernel
REFUSALS = (ValueError, TypeError, library.NativeError)
NUMBERS = [0, 1, -1, 2, 3, 16, 31, 1 << 27, (1 << 27) + 1, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1]
NUMBERS += [-(1 << 31), -(1 << 62), -(1 << 63), (1 << 63) - 2, (1 << 63) - 16]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32]
DTYPES += [torch.int64, torch.uint8, torch.bool, torch.complex64]


class WrongError(AssertionError):
    """A call gave something else than F.linear, or an error that says nothing."""


def stored(random_: random.Random, coded: bool = False) -> Stored:
    """A weight: of values or codes, or of codes whose inputs may be rounded."""
    rows, columns = random_.randint(1, 40), random_.randint(1, 70)
    weight = torch.randn(rows, columns) * (torch.rand(rows, columns) < random_.random())
    kind = 3 if coded else random_.randrange(4)
    if kind == 3:
        grid = Grid(random_.choice([8, 4]), random_.choice([None, 2, 16]), random_.random() < 0.5)
        fmt: Any = Quantized(grid, Bitmask())
        tensors = fmt.pack(grid.fit(weight, weight != 0).round(weight))
        rounded = "int8" if coded else None
        return Stored(fmt, tensors, (rows, columns), torch.float32, activations=rounded)
    weight = weight.to(DTYPES[kind])
    return Stored(Bitmask(), Bitmask().pack(weight), (rows, columns), weight.dtype)


def by_column(random_: random.Random) -> Stored:
    """A weight whose inputs are known to have zeros: of values."""
    made = stored(random_)
    while made.format.grid is not None:
        made = stored(random_)
    return replace(made, zero_inputs=0.5)


def codes_of(made: Stored) -> Tensor:
    return made.format.quantized(made.tensors, made.shape).codes


def other_tensor(tensor: Tensor, random_: random.Random) -> Tensor:
    """The same with something wrong, or nothing: another view, shape, dtype or content."""
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.clone(),
        lambda t: t[:-1] if t.dim() else t,
        lambda t: t.flatten(),
        lambda t: t.unsqueeze(0),
        lambda t: t.reshape(-1)[:0],
        lambda t: torch.cat([t, t]) if t.dim() else t,
        lambda t: t.transpose(0, -1) if t.dim() else t,
        lambda t: t.to(random_.choice(DTYPES)),
        lambda t: t.to("meta"),
        lambda t: t.to_sparse() if t.dim() else t,
        lambda t: t[:1].expand(t.shape) if t.dim() and len(t) else t,
        lambda t: t.clone().as_strided(t.shape, [0] * t.dim()) if t.numel() else t,
        lambda t: torch.stack([t, t], dim=-1)[..., 0],
        lambda t: torch._neg_view(t) if t.dtype not in (torch.bool, torch.uint8) else t,
        lambda t: torch.randint_like(t, 100) if t.dtype != torch.bool else t,
        lambda t: torch.full_like(t, -1) if t.dtype not in (torch.bool, torch.uint8) else ~t,
        lambda t: one_changed(t, random_),
        lambda t: torch.tensor(3),
    ]
    return random_.choice(changes)(tensor)


def one_changed(tensor: Tensor, random_: random.Random) -> Tensor:
    other = tensor.clone()
    if other.numel():
        flat = other.view(-1)
        flat[random_.randrange(len(flat))] = random_.choice([0, 1, -1, 77])
    return other


def operand(value: Any, random_: random.Random) -> Any:
    if isinstance(value, Tensor):
        return other_tensor(value, random_)
    if isinstance(value, int):
        return random_.choice([*NUMBERS, value - 1, value + 1, -value])
    if isinstance(value, list):
        at = random_.randrange(len(value))
        cut = random_.choice([value[:at], [*value, 1], []])
        changed = [*value[:at], operand(value[at], random_), *value[at + 1 :]]
        return changed if random_.random() < 0.9 else cut
    return torch.ones(3) if value is None and random_.random() < 0.5 else value


def one_call(random_: random.Random) -> str:
    """The outcome in words."""
    torch.manual_seed(random_.randrange(1 << 30))
    which = random_.randrange(9)
    if which == 0:
        weight = torch.randn(random_.randint(1, 20), random_.randint(1, 50)).bfloat16()
        name, operator, operands = "dense_row", dense_row, [weight]
    elif which == 1:
        name, operator = "semi_structured_linear", SemiStructuredKernel.operators[0]
        weight = torch.randn(32, 64)
        operands = [weight[:, :32].clone(), None, 32, 64]
    else:
        made = by_column(random_) if which == 8 else stored(random_, coded=which == 7)
        if made.format.name == "quantized" and more_than_8_bits(codes_of(made)) is not None:
            return "codes of 9 bits: no kernel's"
        found = ColumnKernel.take(made) if which == 8 else choose(made)
        kernel: Any = SlicedKernel.of(made) if which < 4 else found.kernel
        back = random_.randrange(2)
        weight = made.dense(torch.float64)
        weight, operator = (
            (weight.T, kernel.operators[1]) if back else (weight, kernel.operators[0])
        )
        name, operands = kernel.name + "_grad" * back, list(kernel.operands())
    shape = random_.choice([(1,), (3,), (2, 3), (), (0,), (40,)]) if which else (1,)
    x = torch.randn(*shape, weight.shape[1]).to(random_.choice(DTYPES[:3]))
    if random_.random() < 0.3:
        x = other_tensor(x, random_)
    before = [o.clone() if isinstance(o, Tensor) else o for o in operands]
    own = operands
    if random_.random() < 0.7:
        at = random_.randrange(len(operands))
        own = [*operands[:at], operand(operands[at], random_), *operands[at + 1 :]]
    try:
        y = operator(x, *own)
    except REFUSALS as error:
        if not str(error):
            raise WrongError(f"{name}: {type(error).__name__} says nothing") from error
        return f"{name}: refused, {type(error).__name__}"
    except (RuntimeError, NotImplementedError) as error:
        # torch's own: no such backend or layout, a number or shape that its operations refuse.
        return f"{name}: refused by torch, {type(error).__name__}"
    if y.is_meta:
        return f"{name}: shapes only"
    exact = all(
        a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(own, operands, strict=True)
    )
    if exact and bool(torch.isfinite(x).all()):
        expected = F.linear(x.double(), weight.double())
        size = F.linear(x.double().abs(), weight.double().abs())
        allowed = 2 * torch.finfo(y.dtype).eps * (expected.abs() + size) + 1e-5 * size + 1e-6
        if name == "integer" and x.shape[-1]:  # x is rounded by up to half a step
            step = x.double().abs().amax(dim=-1, keepdim=True) / 127
            allowed += 0.501 * step * weight.double().abs().sum(dim=1)
        if y.shape != expected.shape or bool(((y.double() - expected).abs() > allowed).any()):
            raise WrongError(f"{name}: not F.linear for x {x.dtype} {tuple(x.shape)} {x.stride()}")
    for old, new in zip(before, operands, strict=True):
        if isinstance(old, Tensor) and not torch.equal(old, new):
            raise WrongError(f"{name}: writes to the weight")
    return f"{name}: right" if exact else f"{name}: another weight, sound"


def run(calls: int, seed: int = 0) -> Counter[str]:
    """Outcomes by class. An unclear error or a wrong value is raised, with the call's seed."""
    outcomes: Counter[str] = Counter()
    for call in range(seed, seed + calls):
        try:
            outcomes[one_call(random.Random(call))] += 1
        except Exception as error:
            error.add_note(f"seed {call}")
            raise
    return outcomes


if __name__ == "__main__":
    if len(sys.argv) > 2:
        library.__file__ = sys.argv[2]
    found = run(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
    lines = [f"{count:8d}  {outcome}" for outcome, count in sorted(found.items())]
    sys.stdout.write("\n".join([*lines, f"{found.total()} hostile calls", ""]))
