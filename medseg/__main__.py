"""``python -m medseg``."""

from medseg.cli.main import entry

entry()
