"""`python -m hf_sparse.bench`: arguments in, tables out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch

from ..kernels import native
from . import endtoend, layers
from .tables import write

Item = TypeVar("Item")

EXAMPLES = """examples:
  python -m hf_sparse.bench layers --shapes 4096x4096 --sparsity 0.5,0.7 --rows 1,16
  python -m hf_sparse.bench layers --path avx2 --threads 1
  python -m hf_sparse.bench layers --values int8 --rows 1
  python -m hf_sparse.bench model --presets 135m,1b --sparsity 0.5
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


def shape(text: str) -> tuple[int, int]:
    """ "OUTxIN" to (out, in)."""
    rows, columns = text.split("x")
    return int(rows), int(columns)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m hf_sparse.bench",
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
    paths = list(native.paths()) if native.available() else []
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
    for command, sparsity in ((single, (0.5, 0.6, 0.7, 0.8)), (whole, (0.5,))):
        command.add_argument("--sparsity", type=listed(fraction), default=sparsity)
        command.add_argument("--threads", type=listed(int), default=threads)
        command.add_argument("--output", type=Path, default=Path("bench-results"))
    return top


def main() -> None:
    given = parser().parse_args()
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
    sys.stdout.write(write(given.output, points, speed, memory))


if __name__ == "__main__":
    main()
