"""Inference: windows, accumulation, export of labels."""
