"""How a sparse layer multiplies."""
