"""``medseg doctor``: what this machine has, and whether half precision is right on it."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "show machine, versions and free space, test precision"
DESCRIPTION = "Show what medseg finds on this machine. Send the output with a bug report: it holds no names of files."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.pipeline.doctor import examine

    found = examine(Path.cwd())
    width = max(len(topic) for topic, _ in found)
    for topic, finding in found:
        print(f"{topic.ljust(width)}  {finding}")
    return 0
