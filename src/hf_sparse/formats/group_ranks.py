"""Groups of n:m: which positions are kept, and the rank that says so, see `n_of_m`."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from ..core.bits import nonzero_bits, unpack_bits
from ..core.errors import FormatError


def index_bits(n: int, m: int) -> int:
    """Bits of a rank."""
    return (math.comb(m, n) - 1).bit_length()


def binomial_table(n: int, m: int) -> Int64[Tensor, "i c"]:
    """C(c, i) at [i, c], for i <= n and c < m."""
    table = [[math.comb(c, i) for c in range(m)] for i in range(n + 1)]
    return torch.tensor(table, dtype=torch.int64, device="cpu")


def choose(
    nonzero: Bool[Tensor, "out groups width"], kept: int, binomials: Int64[Tensor, "i c"]
) -> tuple[Bool[Tensor, "out groups width"], Int64[Tensor, "out groups"]]:
    """Exactly `kept` positions a group, the non-zeros and then the lowest free ones; their ranks.

    The rank of c_1 < c_2 < ... is sum_i C(c_i, i).
    """
    room = kept - nonzero.sum(dim=2, dtype=torch.int8)
    if bool((room < 0).any()):
        raise _overfull(kept)
    columns = list(nonzero.unbind(dim=2))
    found = torch.zeros_like(room, dtype=torch.int64)  # how many are chosen so far
    ranks = torch.zeros_like(found)
    for c, column in enumerate(columns):
        free = ~column & (room > 0)
        room -= free.to(torch.int8)
        columns[c] = chosen = column | free
        found += chosen
        ranks += binomials[:, c].take(found) * chosen
    return torch.stack(columns, dim=2), ranks


def choose_in_bytes(
    bits: UInt8[Tensor, "out bytes"], n: int, m: int
) -> tuple[UInt8[Tensor, "out bytes"], UInt8[Tensor, "out bytes"]]:
    """`choose` for groups of which a byte of the bit mask holds whole ones, by table: the mask of
    what is chosen, and for each byte its groups' ranks, one behind the other."""
    chosen, codes, fits = _byte_tables(n, m)
    found = bits.numpy()
    if not fits[found].all():
        raise _overfull(n)
    return torch.from_numpy(chosen[found]), torch.from_numpy(codes[found])


def chosen_in_bytes(
    codes: UInt8[Tensor, "out bytes"], n: int, m: int
) -> UInt8[Tensor, "out bytes"]:
    """`choose_in_bytes` undone: the mask; nothing is marked where a code is out of range."""
    chosen, known, _ = _byte_tables(n, m)
    table = np.zeros(256, dtype=np.uint8)
    table[known] = chosen
    return torch.from_numpy(table[codes.numpy()])


@functools.cache
def _byte_tables(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `choose_in_bytes` finds for each byte, and whether no group has more than n."""
    every = torch.arange(256, dtype=torch.uint8, device="cpu").view(256, 1)
    groups = unpack_bits(every, 8).view(256, 8 // m, m)
    fits = (groups.sum(dim=2) <= n).all(dim=1)
    chosen, ranks = choose(groups & fits[:, None, None], n, binomial_table(n, m))
    codes = (ranks << index_bits(n, m) * torch.arange(8 // m, device="cpu")).sum(dim=1)
    return nonzero_bits(chosen.view(256, 8)).view(-1).numpy(), codes.byte().numpy(), fits.numpy()


def _overfull(kept: int) -> FormatError:
    return FormatError(f"a group holds more than {kept} non-zero weights")


def unrank(
    codes: Int64[Tensor, "out groups"], kept: int, binomials: Tensor
) -> Int64[Tensor, "out groups n"]:
    """The positions of ranks: from i = n down, c_i is the largest c with C(c, i) <= rest."""
    positions = []
    rest = codes
    for i in range(kept, 0, -1):
        row = binomials[i].contiguous()
        c = (torch.searchsorted(row, rest.contiguous(), right=True) - 1).clamp(min=0)
        positions.append(c)
        rest = rest - row[c]
    return torch.stack(positions[::-1], dim=2) if positions else codes.new_empty((*codes.shape, 0))
