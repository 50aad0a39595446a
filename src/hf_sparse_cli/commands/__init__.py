"""The commands, one file each; a new one is a file and a line here."""

from . import (
    cache,
    compare,
    convert,
    evaluate,
    explain,
    export,
    inspect,
    merge,
    methods,
    prune,
    report,
    run,
    serve,
)

COMMANDS = (
    methods.COMMAND,
    prune.COMMAND,
    evaluate.COMMAND,
    compare.COMMAND,
    inspect.COMMAND,
    explain.COMMAND,
    report.COMMAND,
    export.COMMAND,
    merge.COMMAND,
    convert.COMMAND,
    cache.COMMAND,
    serve.COMMAND,
    run.COMMAND,
)
