"""A run from disk to disk: a dense checkpoint is pruned block by block, and never in memory."""
