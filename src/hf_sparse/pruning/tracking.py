"""Reports in an experiment tracker that is at work already. None is imported for it."""

from __future__ import annotations

import sys
from typing import Any

from ..core.logging import get_logger
from .report import PruningReport

logger = get_logger(__name__)


def log_to_current_run(report: PruningReport) -> None:
    """Log a report's totals and its layers to the current trackio run, if there is one.

    They are one step of the run. What goes wrong there is a warning: the model is pruned.
    """
    trackio: Any = sys.modules.get("trackio")
    if trackio is None:
        return
    try:
        run = trackio.context_vars.current_run.get()
        if run is not None:
            table = trackio.Table(data=report.rows())
            totals = {f"pruning/{name}": value for name, value in report.totals().items()}
            run.log({**totals, "pruning/layers": table})
    except Exception as error:
        logger.warning("the report was not logged to trackio: %s", str(error))
