"""`python -m hf_sparse_cli`, the same as `hf-sparse`."""

from .app import main

main()
