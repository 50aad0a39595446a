"""Programs of others, started so that the transformers they import reads sparse checkpoints.

transformers looks for no plug-ins by itself: a quantisation method is known once its package has
been imported. Python, however, imports a module called `sitecustomize` whenever it starts, and
`environment` puts the one of this folder on its path: every Python that is started so, by whichever
program, imports hf_sparse once it has imported transformers.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ..failures import Failure


def environment(before: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for a program and all that it starts.

    Args:
        before: the variables that there are.
    """
    here, programs = str(Path(__file__).parent), str(Path(sys.executable).parent)
    return {
        **before,
        "PYTHONPATH": os.pathsep.join(filter(None, [here, before.get("PYTHONPATH")])),
        "PATH": os.pathsep.join(filter(None, [programs, before.get("PATH")])),
    }


def become(command: Sequence[str]) -> NoReturn:
    """Let a program take this one's place.

    Args:
        command: the program, as found on the path, first of all beside this Python; its arguments.

    Raises:
        Failure: there is no such program.
    """
    variables = environment(os.environ)
    program = shutil.which(command[0], path=variables["PATH"])
    if program is None:
        raise Failure(
            f"there is no program {command[0]!r} on the PATH, nor beside {sys.executable}"
        )
    sys.stdout.flush()
    os.execve(program, [program, *command[1:]], variables)
