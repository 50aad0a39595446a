"""Whole experts: scored, chosen, and gone from model and config before layers are planned."""
