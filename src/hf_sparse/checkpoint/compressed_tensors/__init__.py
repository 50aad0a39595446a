"""compressed-tensors' old sparse checkpoints -> this project's format, one layer after the other.

The weights are gone through twice. First everything is checked and every layer gets its format,
since each file's header describes all layers; then the files are written, one at a time. No more
than one file of the result, and the layer at work, is ever in memory.
"""

from .run import Conversion, convert

__all__ = ["Conversion", "convert"]
