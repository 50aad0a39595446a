"""What sparse layers gain on this machine: `hf-sparse bench`."""
