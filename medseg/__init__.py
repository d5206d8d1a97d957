"""medseg: self-configuring segmentation of 2D and 3D medical images."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medseg.pipeline.api import load_model, predict

__version__ = "0.1.0"

__all__ = ["__version__", "load_model", "predict"]


def __getattr__(name: str) -> object:
    """``medseg.predict`` and ``medseg.load_model``, loaded when they are first asked for: they need torch."""
    if name in ("load_model", "predict"):
        from medseg.pipeline import api

        return getattr(api, name)
    raise AttributeError(f"module 'medseg' has no attribute {name!r}")
