"""`hf-sparse export`: a sparse checkpoint in a form that other tools read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Annotated

import typer

from ..command import Command
from ..models import Model, Revision, load, read_config, require_sparse
from ..output import Output, Overwrite, check_output
from ..sections import OUTPUT


class Form(StrEnum):
    """What can be exported to."""

    dense = "dense"


@dataclass(frozen=True)
class Exported:
    """Where it is."""

    model: str
    format: str
    output: str
    bytes: int

    def to_dict(self) -> dict[str, str | int]:
        """Its fields."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.model} as {self.format}: {self.bytes / 1e6:.2f} MB in {self.output}"


def export(
    model: Model,
    output: Output,
    format: Annotated[
        Form,
        typer.Option(
            help="dense: an ordinary checkpoint, zeros included, for any tool.",
            rich_help_panel=OUTPUT,
        ),
    ] = Form.dense,
    overwrite: Overwrite = False,
    revision: Revision = None,
) -> Exported:
    """Write a sparse checkpoint for tools that know none.

    Its tokenizer goes along. The folder appears complete or not at all.
    """
    require_sparse(model, read_config(model, revision))
    check_output(output, overwrite, model)
    import hf_sparse
    from hf_sparse.checkpoint.folder import write_folder

    loaded, tokenizer = load(model, revision, "auto", None)

    def write(folder: str) -> None:
        hf_sparse.export_dense(loaded, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    write_folder(output, write)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    return Exported(model, format.value, str(output), size)


COMMAND = Command(
    "export", export, ("hf-sparse export opt-sparse --format dense --output opt-dense",)
)
