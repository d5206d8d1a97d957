"""Interop: one module per foreign format."""
