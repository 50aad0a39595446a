"""Attention over some of the pairs: what picks them, what stands for the others, and their masks.

A selector or residual is one file and one line in its folder's `__init__`; a method is a line in
`core/attention_settings.py` that names one of each.
"""

from .interface import register_attentions

register_attentions()
