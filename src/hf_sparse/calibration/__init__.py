"""Calibration: what users pass -> batches -> the inputs of every layer -> statistics."""
