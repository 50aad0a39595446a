"""`hf-sparse bench`: the package's benchmark, with its own options."""

from __future__ import annotations

import typer

from ..command import Debug, one_sentence


def add_to(app: typer.Typer) -> None:
    """Add the command; what follows it is read by `hf_sparse_cli.bench`."""
    everything = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

    @app.command("bench", context_settings=everything)
    def bench(context: typer.Context, debug: Debug = False) -> None:
        """Time sparse layers, or a whole model, against dense ones on this machine.

        `hf-sparse bench --help` has its options.
        """
        with one_sentence(debug):
            from hf_sparse_cli.bench.__main__ import main

            main(context.args, "hf-sparse bench")
