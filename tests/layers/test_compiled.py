"""A layer compiles to one graph, forward and backward, and computes what the eager one does."""

import fresh

from hf_sparse.formats import FORMATS

COMPILED = """
import torch
from torch import nn
from hf_sparse import SparseLinear
from hf_sparse.core.grids import Grid
from hf_sparse.core.low_rank import LowRank
from hf_sparse.core.patterns import NM
from hf_sparse.formats import FORMATS, choose_format

SHAPE = (5, 12)
weight = torch.randn(SHAPE)
weight = weight.where(NM(2, 4).mask(weight.abs()), 0)


def check(layer, *numbers):
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in numbers:
        x, reference = (torch.ones(tokens, 12).cumsum(1).requires_grad_() for _ in range(2))
        layer.bias.grad = None
        y = compiled(x)
        y.square().sum().backward()
        bias_grad, layer.bias.grad = layer.bias.grad, None
        expected = layer(reference)
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(x.grad, reference.grad)
        torch.testing.assert_close(bias_grad, layer.bias.grad)


def layer_of(fmt, stored, **kwargs):
    bias = nn.Parameter(torch.ones(5))
    return SparseLinear(fmt, fmt.pack(stored), SHAPE, torch.float32, bias, **kwargs)


symmetric, asymmetric = (g.fit(weight).round(weight) for g in (Grid(4, 4, True), Grid(3, 5, False)))
for name in FORMATS:
    for stored in (weight, asymmetric):
        fmt = choose_format(stored, NM(2, 4), name)
        check(layer_of(fmt, stored), 3)
        print(fmt.label)

bitmask = choose_format(symmetric, NM(2, 4), "bitmask")
check(layer_of(bitmask, symmetric), 3, 7)

part = LowRank(torch.randn(5, 2), torch.randn(2, 12))
for stored in (weight, symmetric):
    layer = layer_of(choose_format(stored, NM(2, 4), "bitmask"), stored, low_rank=part)
    check(layer, 3)
    layer.resolve()
    check(layer, 3)
print("all")
"""


def test_it_compiles_to_one_graph_in_every_layout_with_the_same_results():
    # In a process of its own: the checks of shapes that these tests install can't be traced.
    # aot_eager traces forward and backward and needs no C++ compiler on the machine.
    done = fresh.run(COMPILED)
    assert done.returncode == 0, done.stderr
    labels = [label for name in FORMATS for label in (name, f"3-bit {name}")]
    assert done.stdout.splitlines() == [*labels, "all"]
