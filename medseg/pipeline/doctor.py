"""Doctor: what this machine has, and whether half precision computes rightly on it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from medseg import __version__
from medseg.machine import free_memory_bytes, usable_cores
from medseg.networks.device import choose_device

PACKAGES = ("torch", "numpy", "scipy", "nibabel", "pydantic", "safetensors", "blosc2", "pillow", "matplotlib", "rich")


def examine(folder: Path) -> list[tuple[str, str]]:
    """(topic, finding) pairs about the machine, the installation and the free space of ``folder``."""
    found = [
        ("medseg", __version__),
        ("system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
        ("processor", f"{usable_cores()} cores usable of {os.cpu_count()}, {torch.backends.cpu.get_cpu_capability()}"),
        ("memory", f"{free_memory_bytes() / 2**30:.1f} GiB free"),
        ("disk", f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free here"),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append((f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"))
    if not torch.cuda.is_available():
        found.append(("GPU", "none that torch can use"))
    device = choose_device()
    found.append(("networks run on", f"{device.torch_device} in {device.precision}"))
    found.append(("precision", device.reason))
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            found.append((package, "not installed"))
    return found
