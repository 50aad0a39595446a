"""Weights held by column, of which products of one token skip those whose input is 0."""
