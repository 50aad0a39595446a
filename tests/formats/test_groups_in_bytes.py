"""n:m groups that fill bytes of the mask are looked up; the stored bytes are the format's."""

import math
from itertools import product

import pytest
import torch

from hf_sparse.core.errors import FormatError
from hf_sparse.formats.n_of_m import NMPacked

GROUPS = [(n, m) for m in (2, 4, 8) for n in range(1, m)]


def stored(row, n, m):
    """Values and index bytes of a row, as the format's text has them."""
    bits, values, string = (math.comb(m, n) - 1).bit_length(), [], 0
    for group in range(len(row) // m):
        part = row[group * m : (group + 1) * m]
        kept = [i for i, value in enumerate(part) if value]
        free = [i for i in range(m) if i not in kept]
        kept = sorted(kept + free[: n - len(kept)])
        string |= sum(math.comb(c, i + 1) for i, c in enumerate(kept)) << group * bits
        values += [part[i] for i in kept]
    size = -(-len(row) // m * bits // 8)
    return values, list(string.to_bytes(size, "little"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int16])
def test_the_bytes_are_those_of_the_format_for_every_width(dtype):
    generator = torch.Generator().manual_seed(0)
    for (n, m), columns in product(GROUPS, (8, 16, 72)):
        order = torch.rand(5, columns // m, m, generator=generator).argsort(dim=2)
        room = torch.randint(n + 1, (5, columns // m, 1), generator=generator)
        weight = (torch.randint(1, 99, order.shape) * (order < room)).flatten(1).to(dtype)
        packed = NMPacked(n, m).pack(weight)
        for i, row in enumerate(weight.tolist()):
            values, indices = stored(row, n, m)
            assert packed["weight"][i].tolist() == values
            assert packed["weight_indices"][i].tolist() == indices
        assert torch.equal(NMPacked(n, m).unpack(packed, (5, columns), dtype), weight)


def test_a_group_with_too_many_is_refused():
    weight = torch.zeros(2, 16)
    weight[1, 8:11] = 1
    with pytest.raises(FormatError, match="a group holds more than 2 non-zero weights"):
        NMPacked(2, 4).pack(weight)
