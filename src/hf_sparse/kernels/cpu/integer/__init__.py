"""Codes of 8 or 4 bits times activations rounded to int8: byte products, 32 an instruction."""
