"""Is a file a sparse checkpoint? Decided a second time, from docs/format.md alone."""

import json
import math
import struct

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
SIZES = {**FLOATS, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}


class InvalidError(Exception):
    """It is none."""


def require(holds):
    if not holds:
        raise InvalidError


def read_file(content):
    """Metadata, and (dtype, shape, bytes) of each tensor, of a file that is well formed."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    data = content[8 + size :]
    return metadata, {
        key: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for key, t in header.items()
    }


def write_file(metadata, tensors):
    header, place = {"__metadata__": metadata}, 0
    for key, (dtype, shape, data) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(t[2] for t in tensors.values())


def is_valid(metadata, tensors):
    """Does a reader have to take this file?"""
    try:
        content = json.loads(metadata["hf_sparse"])
        require(isinstance(content, dict) and type(content.get("version")) is int)
        require(content["version"] == 1 and isinstance(content.get("layers"), dict))
        for name, entry in content["layers"].items():
            require(isinstance(entry, dict))
            own = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
            own.pop("bias", None)
            check_layer(dict(entry), own)
    except (InvalidError, KeyError, ValueError):
        return False
    return True


def integer(value, low, high):
    require(type(value) is int and low <= value <= high)
    return value


def check_layer(entry, tensors):
    shape = entry.pop("shape")
    require(isinstance(shape, list) and len(shape) == 2)
    rows, columns = (integer(side, 1, 2**31 - 1) for side in shape)
    transposed, spatial = entry.pop("transposed", False), entry.pop("spatial", 0)
    require(type(transposed) is bool and not (transposed and spatial))
    integer(spatial, 0, 2)
    if "low_rank" in entry:
        rank = integer(entry.pop("low_rank"), 1, min(rows, columns))
        for key, size in (("a", [rank, columns]), ("b", [rows, rank])):
            numbers(tensors.pop(f"weight_low_rank_{key}"), size)
    if entry["format"] == "quantized":
        check_quantized(entry, tensors, rows, columns)
    else:
        count = companions(entry, tensors, rows, columns)
        size = [count] if entry["format"] == "bitmask" else [rows, count // rows]
        numbers(tensors.pop("weight"), size)
    require(not tensors)


def numbers(tensor, shape):
    """A tensor of finite floating-point numbers."""
    dtype, found, data = tensor
    require(dtype in FLOATS and found == shape)
    size = FLOATS[dtype]
    exponent, fraction = {"F64": (11, 52), "F32": (8, 23), "F16": (5, 10), "BF16": (8, 7)}[dtype]
    for i in range(0, len(data), size):
        bits = int.from_bytes(data[i : i + size], "little") >> fraction
        require(bits & ((1 << exponent) - 1) != (1 << exponent) - 1)


def bits_of(tensor, rows, used, width):
    """The bits of U8 rows, of which the first `used` count and the others are 0."""
    dtype, shape, data = tensor
    require(dtype == "U8" and shape == [rows, width])
    result = []
    for row in range(rows):
        bits = [data[row * width + i // 8] >> i % 8 & 1 for i in range(8 * width)]
        require(not any(bits[used:]))
        result.append(bits[:used])
    return result


def companions(entry, tensors, rows, columns):
    """How many values a layout has; its companion tensor is checked and taken away."""
    kind = entry.pop("format")
    entry["format"] = kind
    if kind == "bitmask":
        require(set(entry) == {"format"})
        mask = bits_of(tensors.pop("weight_bitmask"), rows, columns, -(-columns // 8))
        return sum(map(sum, mask))
    if kind == "dense":
        require(set(entry) == {"format"})
        return rows * columns
    require(kind == "n:m" and set(entry) == {"format", "n", "m"})
    m = integer(entry["m"], 2, 32)
    n = integer(entry["n"], 1, m - 1)
    tail, full = columns % m, columns // m
    groups, width = -(-columns // m), math.ceil(math.log2(math.comb(m, n)))
    kept = math.ceil(n * tail / m)
    indices = bits_of(tensors.pop("weight_indices"), rows, groups * width, -(-groups * width // 8))
    for row in indices:
        for g in range(groups):
            rank = sum(bit << i for i, bit in enumerate(row[g * width : (g + 1) * width]))
            require(rank < (math.comb(m, n) if g < full else math.comb(tail, kept)))
    return rows * (n * full + kept)


def check_quantized(entry, tensors, rows, columns):
    require(set(entry) == {"format", "bits", "group_size", "sym", "layout"})
    bits, size, sym = entry["bits"], entry["group_size"], entry["sym"]
    require(type(bits) is int and bits in (8, 4, 3) and type(sym) is bool)
    groups = 1 if size is None else -(-columns // integer(size, 1, 2**31 - 1))
    require(isinstance(entry["layout"], dict))
    count = companions(dict(entry["layout"]), tensors, rows, columns)
    dtype, shape, _ = scales = tensors.pop("weight_scales")
    require(dtype == "BF16")
    numbers(scales, [rows, groups])
    for low, high in zip(scales[2][::2], scales[2][1::2], strict=True):
        require(high < 128 and (low or high))
    if not sym:
        dtype, shape, zeros = tensors.pop("weight_zeros")
        require(dtype == "U8" and shape == [rows, groups] and max(zeros) < 2**bits)
    width = -(-count * bits // 8)
    dtype, shape, data = tensors.pop("weight")
    require(dtype == "U8" and shape == [width])
    (stream,) = bits_of((dtype, [1, width], data), 1, count * bits, width)
    for i in range(count):
        number = sum(bit << b for b, bit in enumerate(stream[i * bits : (i + 1) * bits]))
        require(not (sym and number == 2 ** (bits - 1)))
