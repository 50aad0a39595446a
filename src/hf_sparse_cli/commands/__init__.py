"""The commands, one file each; a new one is a file and a line here."""

from . import cache, compare, convert, evaluate, explain, export, inspect, prune, report

COMMANDS = (
    prune.COMMAND,
    evaluate.COMMAND,
    compare.COMMAND,
    inspect.COMMAND,
    explain.COMMAND,
    report.COMMAND,
    export.COMMAND,
    convert.COMMAND,
    cache.COMMAND,
)
