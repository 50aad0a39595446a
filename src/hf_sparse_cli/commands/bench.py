"""`hf-sparse bench layers|model|gpu`: what sparse layers gain on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..command import Command
from ..listed import count, fraction, listed, one_of, shape
from ..models import quantisation, read_config, require_sparse
from ..output import Overwrite, check_output
from ..sections import OUTPUT


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
    pattern: Annotated[
        str, typer.Option(help='"unstructured", or "n:m" in place of the sparsities.')
    ] = "unstructured",
    activations: Annotated[
        Literal["int8"] | None,
        typer.Option(help="What x is rounded to, for int8 and int4 values.  [default: nothing]"),
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
    from hf_sparse.core.patterns import NM, parse_pattern
    from hf_sparse.kernels.cpu import library

    from ..bench import layers

    kept = parse_pattern(pattern, 0.5)

    if path is not None:
        paths = list(library.paths()) if library.available() else []
        listed("--path", path, one_of(paths))
    settings = layers.LayerSettings(
        listed("--shapes", shapes, shape),
        (kept.sparsity,) if isinstance(kept, NM) else listed("--sparsity", sparsity, fraction),
        listed("--rows", rows, count),
        _threads(threads),
        listed("--values", values, one_of(layers.VALUES)),
        group_size,
        pattern,
        activations,
        path,
        cold_mb << 20,
        rounds,
        seconds,
    )
    from ..bench.tables import write

    return Measured(*write(output, layers.measure(settings), (), ()))


def bench_model(
    presets: Annotated[
        str | None, typer.Option(help="Sizes: any of 135m,1b,1.1b,tiny.  [default: 135m]")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(help="Fractions of zeros, separated by commas.  [default: 0.5]"),
    ] = None,
    dtypes: Annotated[
        str | None,
        typer.Option(help="What is computed in: any of fp32,bf16.  [default: fp32,bf16]"),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after it.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each model does so.")] = 5,
    threads: Threads = None,
    sparse: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A sparse checkpoint of your own, beside --dense."),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What it was made of: as it is, and as torchao and bitsandbytes have it.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to measure the perplexity of each on.")
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a window of it.")] = 256,
    num_samples: Annotated[int, typer.Option(min=1, help="Windows of it.")] = 32,
    llama_bench: Annotated[
        Path | None,
        typer.Option(help="llama.cpp's program: times its file types on a Llama, too."),
    ] = None,
    output: Folder = None,
    overwrite: Overwrite = False,
) -> Measured:
    """Time a whole model, sparse against dense: a Llama with random weights, or one of yours.

    With --sparse and --dense yours is compared with what else there is to run it in.
    """
    _check(output, overwrite)
    of_random = {"--presets": presets, "--sparsity": sparsity, "--dtypes": dtypes}
    of_yours = {"--sparse": sparse, "--dense": dense, "--data": data, "--llama-bench": llama_bench}
    if sparse is not None and dense is not None:
        _refuse(of_random, "is for models with random weights, --sparse and --dense name yours")
        more = data, seq_len, num_samples, prompt, tokens, rounds, llama_bench
        return _against_others(output, threads, sparse, dense, *more)
    _refuse(of_yours, "needs --sparse and --dense, both")
    from ..bench import endtoend
    from ..bench.tables import write

    settings = endtoend.ModelSettings(
        listed("--presets", presets or "135m", one_of(endtoend.PRESETS)),
        listed("--sparsity", sparsity or "0.5", fraction),
        _threads(threads),
        listed("--dtypes", dtypes or "fp32,bf16", one_of(endtoend.DTYPES)),
        prompt,
        tokens,
        rounds,
    )
    return Measured(*write(output, (), *endtoend.measure(settings)))


def _refuse(options: Mapping[str, object], why: str) -> None:
    for option, given in options.items():
        if given is not None:
            raise typer.BadParameter(why, param_hint=option)


def _against_others(
    output: Path | None, threads: str | None, sparse: str, dense: str, *more: Any
) -> Measured:
    number, *others = _threads(threads)
    if others:
        raise typer.BadParameter(
            "takes one number with --sparse and --dense", param_hint="--threads"
        )
    require_sparse(sparse, read_config(sparse, None))
    if quantisation(read_config(dense, None)) is not None:
        raise typer.BadParameter(f"{dense} is not dense", param_hint="--dense")
    if (program := more[-1]) is not None and not program.is_file():
        raise typer.BadParameter(f"there is no file {program}", param_hint="--llama-bench")
    from ..bench import alternatives
    from ..bench.alternatives_table import write
    from ..bench.threads import torch_threads

    with torch_threads(number):
        rows = alternatives.measure(alternatives.Settings(sparse, dense, *more))
        return Measured(*write(output, rows))


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
    Command(
        "model",
        bench_model,
        (
            "hf-sparse bench model --presets 135m,1b --sparsity 0.5",
            "hf-sparse bench model --sparse opt-sparse --dense opt --data held-out.txt",
        ),
    ),
    Command("gpu", bench_gpu, ("hf-sparse bench gpu --parts decode,prefill",)),
)
