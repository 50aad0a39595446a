"""What a user asks for: `SparseConfig`, its checks, and the recipes behind method names."""
