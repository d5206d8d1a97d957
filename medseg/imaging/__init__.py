"""Imaging: arrays and geometry, without torch."""
