"""The ``medseg`` command: chooses the sub-command and turns errors into messages and exit codes."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return 0


def entry() -> None:
    """Console entry point."""
    sys.exit(main())
