"""Values and conventions that every stage hands on: errors, patterns, statistics, grids, names."""
