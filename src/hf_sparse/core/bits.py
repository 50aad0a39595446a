"""Bit strings in uint8 tensors: bit i of a row is bit i % 8 of byte i // 8, bit 0 the lowest.

A stream of b-bit numbers is one row: number i takes the bits from b i on, its lowest bit first.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor

from .native import call, library_for, on_cpu


def nonzero_bits(weight: Shaped[Tensor, "rows n"]) -> UInt8[Tensor, "rows bytes"]:
    """What isn't 0: bit j % 8 of byte j // 8 of row i stands for weight[i, j]; bits behind the last
    are 0."""
    rows, n = weight.shape
    library = library_for(weight)
    if library is not None and weight.numel():
        weight = weight.detach().contiguous()
        bits = torch.empty(rows, -(-n // 8), dtype=torch.uint8, device="cpu")
        sign = weight.is_floating_point()
        call(library.whole_nonzero_bits, rows, n, weight, weight.element_size(), sign, bits)
        return bits
    if on_cpu(weight):
        nonzero = weight.detach().bool().numpy()
        return torch.from_numpy(np.packbits(nonzero, axis=1, bitorder="little"))
    padded = torch.nn.functional.pad(weight.bool().to(torch.uint8), (0, -n % 8)).view(rows, -1, 8)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=weight.device)
    return (padded * places).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, "rows bytes"], n: int) -> Bool[Tensor, "rows n"]:
    """The first n bits of each row."""
    if on_cpu(packed):
        unpacked = np.unpackbits(packed.numpy(), axis=1, count=n, bitorder="little")
        return torch.from_numpy(unpacked).view(torch.bool)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.view(packed.shape[0], -1)[:, :n].to(torch.bool)


def count_ones(packed: UInt8[Tensor, "rows bytes"]) -> int:
    """How many bits are set, without a temporary that is larger than they are."""
    if on_cpu(packed):
        return int(np.bitwise_count(packed.numpy()).sum(dtype=np.int64))
    bytes_of_value = torch.bincount(packed.flatten(), minlength=256)
    ones = torch.tensor([value.bit_count() for value in range(256)], device=packed.device)
    return int((bytes_of_value * ones).sum())


def padding_is_zero(packed: UInt8[Tensor, "rows bytes"], n: int) -> bool:
    """Are the bits behind the first n of each row all 0?"""
    if n % 8 == 0 or packed.numel() == 0:
        return True
    return not bool((packed[:, -1] >> (n % 8)).any())


def pack_numbers(numbers: UInt8[Tensor, " n"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Numbers below 2^bits to ceil(n bits / 8) bytes."""
    if bits == 8:
        return numbers.clone()
    if bits == 4:
        pairs = torch.nn.functional.pad(numbers, (0, len(numbers) % 2))
        return pairs[::2] | pairs[1::2] << 4
    shifts = torch.arange(bits, dtype=torch.uint8, device=numbers.device)
    string = (numbers.unsqueeze(-1) >> shifts) & 1
    return nonzero_bits(string.to(torch.bool).view(1, -1)).view(-1)


def pack_rows_of_numbers(
    numbers: UInt8[Tensor, "rows n"], bits: int
) -> UInt8[Tensor, "rows bytes"]:
    """Numbers below 2^bits, on the CPU, each row to ceil(n bits / 8) bytes of its own."""
    rows, n = numbers.shape
    padded = np.zeros((rows, -(-n // 8), 8), dtype=np.uint8)
    padded.reshape(rows, -1)[:, :n] = numbers.numpy()
    words = np.zeros(padded.shape[:2], dtype="<u8")
    for place in range(8):  # eight numbers are `bits` bytes
        words |= padded[..., place].astype("<u8") << np.uint64(place * bits)
    joined = words.view(np.uint8).reshape(rows, -1, 8)[..., :bits].reshape(rows, -1)
    return torch.from_numpy(np.ascontiguousarray(joined[:, : -(-n * bits // 8)]))


def unpack_rows_of_numbers(
    packed: UInt8[Tensor, "rows bytes"], n: int, bits: int
) -> UInt8[Tensor, "rows n"]:
    """`pack_rows_of_numbers` undone, for n numbers a row."""
    rows = len(packed)
    blocks = -(-n // 8)
    padded = np.zeros((rows, blocks * bits), dtype=np.uint8)
    padded[:, : packed.shape[1]] = packed.numpy()
    joined = np.zeros((rows, blocks, 8), dtype=np.uint8)
    joined[..., :bits] = padded.reshape(rows, blocks, bits)
    words = joined.view("<u8")[..., 0]
    numbers = np.empty((rows, blocks, 8), dtype=np.uint8)
    for place in range(8):
        numbers[..., place] = (words >> np.uint64(place * bits)) & np.uint64((1 << bits) - 1)
    return torch.from_numpy(np.ascontiguousarray(numbers.reshape(rows, -1)[:, :n]))


def unpack_numbers(packed: UInt8[Tensor, " bytes"], bits: int) -> UInt8[Tensor, " n"]:
    """As many numbers as the bytes have room for; those of the padding are 0."""
    if bits == 8:
        return packed.clone()
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], dim=1).flatten()
    n = packed.numel() * 8 // bits
    string = unpack_bits(packed.view(1, -1), n * bits).view(n, bits).to(torch.uint8)
    shifts = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (string << shifts).sum(dim=1, dtype=torch.uint8)
