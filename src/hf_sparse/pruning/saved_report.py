"""The report that was saved with a checkpoint."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.commit import REPORT_FILE
from ..checkpoint.companion import companion
from ..core.errors import CheckpointError
from ..core.logging import get_logger
from .report import PruningReport

logger = get_logger(__name__)


def saved_report(folder: Path) -> PruningReport | None:
    """The report that was saved with a checkpoint; None if there is none that can be used.

    Args:
        folder: where its files lie. If that is in the cache of the Hub, the report is fetched.
    """
    try:
        return PruningReport.from_folder(companion(folder, REPORT_FILE).parent)
    except CheckpointError as error:
        logger.warning("the model is loaded without its report: %s", str(error))
    except OSError as error:
        logger.debug("the model is loaded without its report: %s", str(error))
    return None
