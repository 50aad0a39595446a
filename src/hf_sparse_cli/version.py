"""`--version`."""

from importlib.metadata import version

import typer


def print_version(wanted: bool) -> None:
    """Print the version of hf_sparse and end, if that is wanted."""
    if wanted:
        typer.echo(f"hf-sparse {version('hf_sparse')}")
        raise typer.Exit
