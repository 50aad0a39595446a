"""What sparse layers gain on this machine: `python -m hf_sparse_cli.bench`."""
