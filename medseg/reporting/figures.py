"""Figures: the pictures that medseg makes of cases and of trainings."""

from medseg.reporting.curves import HistoryPoint, training_picture
from medseg.reporting.overlay import overlay_picture

__all__ = ["HistoryPoint", "overlay_picture", "training_picture"]
