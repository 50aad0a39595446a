"""A process that has never pruned anything: loads saved models and runs them.

Reads lines `folder<TAB>class<TAB>file of inputs<TAB>file for outputs`, answers each with one line.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_SPARSE_MEASURE"] = "0"

import torch
import transformers
from check import load_and_run

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

for line in sys.stdin:
    folder, name, inputs, found = line.rstrip("\n").split("\t")
    torch.save(load_and_run(Path(folder), getattr(transformers, name), torch.load(inputs)), found)
    sys.stdout.write("done\n")
    sys.stdout.flush()
