"""The sections of a command's help, in the order in which they are listed.

Those of the arguments of `SparseConfig` are `hf_sparse.config.arguments`' groups.
"""

ARGUMENTS = "Arguments"
OPTIONS = "Options"
DATA = "Data"
MEASUREMENTS = "What to measure"
METHOD = "Method"
OUTPUT = "Output"
MODEL = "Model"
OTHER = "Other"
STREAMING = "From disk to disk"

SECTIONS = (
    ARGUMENTS,
    OPTIONS,
    MEASUREMENTS,
    "What to prune",
    DATA,
    METHOD,
    "Mixtures of experts",
    "Storage",
    "Attention",
    OUTPUT,
    MODEL,
    STREAMING,
    OTHER,
)
