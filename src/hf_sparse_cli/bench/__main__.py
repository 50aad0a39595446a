"""`hf-sparse bench`, or `python -m hf_sparse_cli.bench`: arguments in, tables out."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from hf_sparse.kernels.cpu import library

from . import endtoend, gpu, layers
from .tables import RESULTS, write

Item = TypeVar("Item")

PROGRAM = "python -m hf_sparse_cli.bench"
EXAMPLES = """examples:
  hf-sparse bench layers --shapes 4096x4096 --sparsity 0.5,0.7 --rows 1,16
  hf-sparse bench layers --path avx2 --threads 1
  hf-sparse bench layers --values int8,int4 --group-size 128 --rows 1
  hf-sparse bench gpu --parts decode,prefill
  hf-sparse bench model --presets 135m,1b --sparsity 0.5
"""


def listed(convert: Callable[[str], Item]) -> Callable[[str], tuple[Item, ...]]:
    """An argument type for values separated by commas."""

    def parse(text: str) -> tuple[Item, ...]:
        return tuple(convert(part) for part in text.split(","))

    return parse


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """An argument type for one of some names."""

    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return text

    return parse


def fraction(text: str) -> float:
    """A sparsity, 0 <= s < 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no fraction of zeros: pass 0 <= s < 1")
    return value


def group_size(text: str) -> int:
    """A positive even number."""
    value = int(text)
    if value < 2 or value % 2:
        raise argparse.ArgumentTypeError(f"{text} is no group size: pass an even number")
    return value


def shape(text: str) -> tuple[int, int]:
    """ "OUTxIN" to (out, in)."""
    rows, columns = text.split("x")
    return int(rows), int(columns)


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command line, of a program of that name."""
    top = argparse.ArgumentParser(
        prog=program,
        description="Times sparse layers, or a whole model, against dense ones on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    threads = (torch.get_num_threads(),)
    single = commands.add_parser("layers", help="products of single layers")
    single.add_argument(
        "--shapes", type=listed(shape), default=((4096, 4096), (11008, 4096), (4096, 11008))
    )
    single.add_argument("--rows", type=listed(int), default=(1, 4, 16, 128, 512), help="tokens, M")
    single.add_argument(
        "--values",
        type=listed(one_of(layers.VALUES)),
        default=("bf16",),
        help=f"dtypes of the kept values: {','.join(layers.VALUES)}",
    )
    single.add_argument(
        "--group-size",
        type=group_size,
        help="columns that share a scale of int8 and int4 values; default: all of a row",
    )
    paths = list(library.paths()) if library.available() else []
    single.add_argument(
        "--path", choices=paths, help="instruction set of the kernels; default: the best"
    )
    single.add_argument("--cold-mb", type=int, default=512, help="copies of a weight take this")
    single.add_argument("--rounds", type=int, default=7)
    single.add_argument("--seconds", type=float, default=2.0, help="per point, at least")
    whole = commands.add_parser("model", help="a Llama with random weights, end to end")
    sizes = ", ".join(endtoend.PRESETS)
    presets = listed(one_of(endtoend.PRESETS))
    whole.add_argument("--presets", type=presets, default=("135m",), help=f"sizes: {sizes}")
    whole.add_argument(
        "--dtypes", type=listed(one_of(endtoend.DTYPES)), default=tuple(endtoend.DTYPES)
    )
    whole.add_argument("--prompt", type=int, default=256)
    whole.add_argument("--tokens", type=int, default=16)
    whole.add_argument("--rounds", type=int, default=5)
    device = commands.add_parser("gpu", help="all that an NVIDIA GPU gains")
    device.add_argument("--parts", type=listed(one_of(gpu.PARTS)), default=tuple(gpu.PARTS))
    device.add_argument("--layers", type=int, default=32, help="of the Llama-8B-shaped model")
    device.add_argument("--json", action="store_true", help="print gpu.json, no table")
    device.add_argument("--output", type=Path, default=Path("bench-results"))
    for command, sparsity in ((single, (0.5, 0.6, 0.7, 0.8)), (whole, (0.5,))):
        command.add_argument("--sparsity", type=listed(fraction), default=sparsity)
        command.add_argument("--threads", type=listed(int), default=threads)
        command.add_argument("--json", action="store_true", help="print results.json, no tables")
        command.add_argument("--output", type=Path, default=Path("bench-results"))
    return top


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> None:
    """Measure and print; ends in SystemExit if an argument is wrong.

    Args:
        arguments: without the program's name; None for those of the process.
        program: its name, for help and errors.
    """
    given = _parse(arguments, program)
    if given.command == "gpu":
        for found in gpu.measure(given.parts, given.layers):
            text = gpu.write(given.output, found)
        sys.stdout.write(json.dumps(found) + "\n" if given.json else text)
        return
    points: list[layers.LayerPoint] = []
    speed: list[endtoend.SpeedPoint] = []
    memory: list[endtoend.MemoryPoint] = []
    if given.command == "layers":
        points = layers.measure(
            layers.LayerSettings(
                given.shapes,
                given.sparsity,
                given.rows,
                given.threads,
                given.values,
                given.group_size,
                given.path,
                given.cold_mb << 20,
                given.rounds,
                given.seconds,
            )
        )
    else:
        speed, memory = endtoend.measure(
            endtoend.ModelSettings(
                given.presets,
                given.sparsity,
                given.threads,
                given.dtypes,
                given.prompt,
                given.tokens,
                given.rounds,
            )
        )
    tables = write(given.output, points, speed, memory)
    sys.stdout.write((given.output / RESULTS).read_text() + "\n" if given.json else tables)


def _parse(arguments: Sequence[str] | None, program: str) -> argparse.Namespace:
    """Read the command line; for an unknown option name the nearest ones."""
    read = parser(program)
    given, unknown = read.parse_known_args(arguments)
    if unknown:
        known = [f"--{name.replace('_', '-')}" for name in vars(given)]
        near = difflib.get_close_matches(unknown[0], known)
        hint = f" (possible: {', '.join(near)})" if near else ""
        read.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return given


if __name__ == "__main__":
    main()
