"""`hf-sparse bench layers|model|gpu`: what sparse layers gain on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..command import Command
from ..output import Overwrite, check_output
from ..sections import OUTPUT

Item = TypeVar("Item")


@dataclass(frozen=True)
class Measured:
    """What was measured: tables for people, figures for machines."""

    tables: str
    figures: Mapping[str, Any]

    def to_dict(self) -> Mapping[str, Any]:
        """The figures."""
        return self.figures

    def __str__(self) -> str:
        return self.tables.removesuffix("\n")


def listed(option: str, text: str, convert: Callable[[str], Item]) -> tuple[Item, ...]:
    """The values of an option that takes several, separated by commas.

    Raises:
        typer.BadParameter: one of them can't be converted.
    """
    try:
        return tuple(convert(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """A conversion that takes some names alone."""

    def convert(text: str) -> str:
        if text not in known:
            raise ValueError(f"{text!r} is not one of {', '.join(known)}")
        return text

    return convert


def fraction(text: str) -> float:
    """A sparsity, 0 <= s < 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError(f"{text} is no fraction of zeros: pass 0 <= s < 1")
    return value


def count(text: str) -> int:
    """An integer from 1 on."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise ValueError(f"{text!r} is no count: pass an integer of at least 1")
    return int(text)


def shape(text: str) -> tuple[int, int]:
    """ "OUTxIN" to (out, in)."""
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise ValueError(f"{text!r} is no shape: pass OUTxIN, e.g. 4096x11008")
    return count(rows), count(columns)


Sparsities = Annotated[str, typer.Option(help="Fractions of zeros, separated by commas.")]
Threads = Annotated[
    str | None, typer.Option(help="Numbers of threads, separated by commas.  [default: torch's]")
]
Folder = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the tables, their JSON and the plot.  [default: nothing is written]",
        rich_help_panel=OUTPUT,
    ),
]


def bench_layers(
    shapes: Annotated[
        str, typer.Option(help="OUTxIN of the weights, separated by commas.")
    ] = "4096x4096,11008x4096,4096x11008",
    sparsity: Sparsities = "0.5,0.6,0.7,0.8",
    rows: Annotated[
        str, typer.Option(help="Numbers of tokens, M, separated by commas.")
    ] = "1,4,16,128,512",
    values: Annotated[
        str, typer.Option(help="Dtypes of the kept values: any of fp32,bf16,fp16,int8,int4.")
    ] = "bf16",
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Columns that share a scale of int8 and int4 values.  [default: all of a row]"
        ),
    ] = None,
    path: Annotated[
        str | None, typer.Option(help="Instruction set of the kernels.  [default: the best]")
    ] = None,
    threads: Threads = None,
    cold_mb: Annotated[int, typer.Option(min=1, help="Copies of a weight take this.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each candidate, at least.")] = 7,
    seconds: Annotated[float, typer.Option(min=0, help="Time for a point, at least.")] = 2.0,
    output: Folder = None,
    overwrite: Overwrite = False,
) -> Measured:
    """Time the products of single layers, sparse against dense, from cold weights."""
    _check(output, overwrite)
    if group_size is not None and (group_size < 2 or group_size % 2):
        raise typer.BadParameter(
            f"{group_size} is no group size: pass an even number", param_hint="--group-size"
        )
    from hf_sparse.kernels.cpu import library

    from ..bench import layers

    if path is not None:
        paths = list(library.paths()) if library.available() else []
        listed("--path", path, one_of(paths))
    settings = layers.LayerSettings(
        listed("--shapes", shapes, shape),
        listed("--sparsity", sparsity, fraction),
        listed("--rows", rows, count),
        _threads(threads),
        listed("--values", values, one_of(layers.VALUES)),
        group_size,
        path,
        cold_mb << 20,
        rounds,
        seconds,
    )
    from ..bench.tables import write

    return Measured(*write(output, layers.measure(settings), (), ()))


def bench_model(
    presets: Annotated[str, typer.Option(help="Sizes: any of 135m,1b,1.1b,tiny.")] = "135m",
    sparsity: Sparsities = "0.5",
    dtypes: Annotated[
        str, typer.Option(help="What is computed in: any of fp32,bf16.")
    ] = "fp32,bf16",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after it.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each model does so.")] = 5,
    threads: Threads = None,
    output: Folder = None,
    overwrite: Overwrite = False,
) -> Measured:
    """Time a Llama with random weights end to end, sparse against dense."""
    _check(output, overwrite)
    from ..bench import endtoend
    from ..bench.tables import write

    settings = endtoend.ModelSettings(
        listed("--presets", presets, one_of(endtoend.PRESETS)),
        listed("--sparsity", sparsity, fraction),
        _threads(threads),
        listed("--dtypes", dtypes, one_of(endtoend.DTYPES)),
        prompt,
        tokens,
        rounds,
    )
    return Measured(*write(output, (), *endtoend.measure(settings)))


def bench_gpu(
    parts: Annotated[
        str, typer.Option(help="What to measure: any of decode,prefill,solve,model,prune.")
    ] = "decode,prefill,solve,model,prune",
    layers: Annotated[
        int, typer.Option(min=1, help="Layers of the model that is shaped like Llama-8B.")
    ] = 32,
    output: Folder = None,
    overwrite: Overwrite = False,
) -> Measured:
    """Measure all that an NVIDIA GPU gains. What is known is written after each part."""
    _check(output, overwrite)
    from ..bench import gpu
    from ..bench.gpu_table import write

    found: dict[str, Any] = {}
    tables = ""
    for found in gpu.measure(listed("--parts", parts, one_of(gpu.PARTS)), layers):
        tables = write(output, found)
    return Measured(tables, found)


def _check(output: Path | None, overwrite: bool) -> None:
    if output is not None:
        check_output(output, overwrite)


def _threads(text: str | None) -> tuple[int, ...]:
    import torch

    return (torch.get_num_threads(),) if text is None else listed("--threads", text, count)


COMMANDS = (
    Command(
        "layers",
        bench_layers,
        (
            "hf-sparse bench layers --shapes 4096x4096 --sparsity 0.5,0.7 --rows 1,16",
            "hf-sparse bench layers --path avx2 --threads 1",
            "hf-sparse bench layers --values int8,int4 --group-size 128 --rows 1",
        ),
    ),
    Command("model", bench_model, ("hf-sparse bench model --presets 135m,1b --sparsity 0.5",)),
    Command("gpu", bench_gpu, ("hf-sparse bench gpu --parts decode,prefill",)),
)
