"""`hf-sparse compare`: several methods at several sparsities, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..command import Command, note
from ..failures import Failure
from ..models import (
    DATA_HELP,
    DeviceMap,
    Dtype,
    GgufFile,
    Model,
    Revision,
    check_dtype,
    load,
    require_dense,
)
from ..options import RENAMED_OPTIONS, ConfigFile, config_parameters, make_arguments
from ..output import Overwrite, check_output
from ..sections import DATA, MEASUREMENTS, OUTPUT

if TYPE_CHECKING:
    from hf_sparse import Comparison

VARIED = ("method", "sparsity", "pattern")


@dataclass(frozen=True)
class Compared:
    """What was found, and where it is."""

    comparison: Comparison
    output: Path

    def to_dict(self) -> dict[str, Any]:
        """The comparison's values, and where its files are."""
        return {**self.comparison.to_dict(), "output": str(self.output)}

    def __str__(self) -> str:
        return f"{self.comparison}\nsaved in {self.output}"


def compare(
    model: Model,
    settings: Mapping[str, Any],
    methods: Annotated[
        str,
        typer.Option(
            help="Recipes or plain methods, separated by commas.", rich_help_panel=MEASUREMENTS
        ),
    ],
    sparsities: Annotated[
        str,
        typer.Option(
            help="Fractions of zeros or n:m patterns, separated by commas.",
            rich_help_panel=MEASUREMENTS,
        ),
    ],
    eval_dataset: Annotated[str, typer.Option(help=DATA_HELP, rich_help_panel=DATA)],
    output: Annotated[
        Path,
        typer.Option(help="Folder for the table, its JSON and the plot.", rich_help_panel=OUTPUT),
    ],
    overwrite: Overwrite = False,
    eval_samples: Annotated[
        int | None,
        typer.Option(help="Sequences of --eval-dataset to use at most.", rich_help_panel=DATA),
    ] = None,
    plot: Annotated[
        bool | None,
        typer.Option(
            "--plot/--no-plot",
            help="Draw comparison.png.  [default: if matplotlib is installed]",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    config: ConfigFile = None,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> Compared:
    """Compare methods and sparsities on a model.

    Perplexity on --eval-dataset, time of pruning and bytes go into comparison.md, comparison.json
    and comparison.png; all of them appear, or none. The model is loaded anew for each run, so only
    one is in memory at a time.
    """
    require_dense(model, revision, gguf_file)
    check_output(output, overwrite, model)
    check_dtype(dtype)
    arguments = make_arguments(settings, config)
    drawable = find_spec("matplotlib") is not None
    if plot and not drawable:
        raise Failure("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    if plot is None and not drawable:
        note("comparison.png is left out: it needs matplotlib, pip install matplotlib")
    import hf_sparse
    from hf_sparse.calibration.sources import check_source
    from hf_sparse.calibration.tokenizers import find_tokenizer

    for named in (arguments.get("dataset"), eval_dataset):
        check_source(named)

    if gguf_file is not None:
        arguments.setdefault("tokenizer", find_tokenizer(model, revision, gguf_file))
    found = hf_sparse.compare(
        lambda: load(model, revision, dtype, device_map, gguf_file)[0],
        methods.split(","),
        [_setting(text) for text in sparsities.split(",")],
        eval_dataset,
        eval_samples=eval_samples,
        **arguments,
    )
    found.save(output, drawable if plot is None else plot)
    return Compared(found, output)


def _setting(text: str) -> float | str:
    """A fraction, or else a pattern."""
    try:
        return float(text)
    except ValueError:
        return text.strip()


COMMAND = Command(
    "compare",
    compare,
    (
        "hf-sparse compare facebook/opt-125m --methods sparsegpt,fast --sparsities 0.5,0.6,2:4 "
        "--dataset wikitext2 --eval-dataset wikitext2 --output compared",
    ),
    generated=[p for p in config_parameters() if p.name not in VARIED],
    renamed=RENAMED_OPTIONS | {"--data": "--eval-dataset"},
)
