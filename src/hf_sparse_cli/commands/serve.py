"""`hf-sparse serve`: a sparse model behind an OpenAI-compatible server, transformers' own."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, NoReturn

import typer

from ..command import Command
from ..failures import Failure
from ..models import Model, read_config
from ..startup import become

PACKAGES = ("fastapi", "uvicorn", "openai")


def serve(
    model: Model,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OPTIONS]...",
            help="What `transformers serve --help` lists, e.g. --port 8001.",
        ),
    ] = None,
) -> NoReturn:
    """Serve a model, sparse or dense, like OpenAI.

    The server is that of `transformers serve`. It listens on http://localhost:8000/v1 unless told
    otherwise.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise Failure(f"serving needs {', '.join(missing)}: pip install 'transformers[serving]'")
    read_config(model, None)
    become(["transformers", "serve", model, *(options or ())])


COMMAND = Command(
    "serve",
    serve,
    ("hf-sparse serve opt-sparse", "hf-sparse serve me/opt-sparse --port 8001 --dtype bfloat16"),
    hands_over=True,
)
