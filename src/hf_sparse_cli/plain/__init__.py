"""What the command line shares with hf_sparse and may not wait for torch to have.

Importing anything of hf_sparse runs its `__init__`, which loads torch and transformers. So these
modules, which need neither, are imported as submodules of this package, whose path is hf_sparse's.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_sparse.checkpoint.header import Header, HeaderTensor, read_header
    from hf_sparse.checkpoint.save_id import check_ids, check_one_save, check_single
    from hf_sparse.checkpoint.weight_files import check_distinct, weight_files
    from hf_sparse.config.argument import Argument
    from hf_sparse.config.arguments import ARGUMENTS, RENAMED, unknown_arguments
    from hf_sparse.config.keys import SAVE_KEY
    from hf_sparse.core.errors import CheckpointError
    from hf_sparse.core.json_records import parse_json, read_json
    from hf_sparse.core.untrusted_text import printable
else:
    __path__ = find_spec("hf_sparse").submodule_search_locations
    from .checkpoint.header import Header, HeaderTensor, read_header
    from .checkpoint.save_id import check_ids, check_one_save, check_single
    from .checkpoint.weight_files import check_distinct, weight_files
    from .config.argument import Argument
    from .config.arguments import ARGUMENTS, RENAMED, unknown_arguments
    from .config.keys import SAVE_KEY
    from .core.errors import CheckpointError
    from .core.json_records import parse_json, read_json
    from .core.untrusted_text import printable

__all__ = [
    "ARGUMENTS",
    "RENAMED",
    "SAVE_KEY",
    "Argument",
    "CheckpointError",
    "Header",
    "HeaderTensor",
    "check_distinct",
    "check_ids",
    "check_one_save",
    "check_single",
    "parse_json",
    "printable",
    "read_header",
    "read_json",
    "unknown_arguments",
    "weight_files",
]
