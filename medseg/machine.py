"""The machine: how many cores and how much memory this process may use, containers and batch systems included.

A container or a batch job that is given 4 of 64 cores and 16 of 256 GiB still sees the whole machine in most places;
its limits stand in control groups (cgroups, versions 1 and 2), which are read here. No environment variable is.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_GROUPS = "sys/fs/cgroup"
_UNKNOWN = 4 * 2**30  # taken where no system call tells
_UNLIMITED = 2**60  # version 1 writes "no limit" as the largest multiple of a page; nobody has an exbibyte


def usable_cores(root: Path = _ROOT) -> int:
    """Cores that this process may keep busy: its affinity, or less where a quota allows less; at least 1.

    A quota of 2.5 cores counts as 2: a third thread would make all three wait for the next period.

    Args:
        root: where ``proc`` and ``sys`` are found; another folder in tests.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    return max(1, int(min([cores, *_core_quotas(root)])))


def free_memory_bytes(root: Path = _ROOT) -> int:
    """Memory that this process can take without swapping or being killed, in bytes.

    It is what the system calls available, or less where a control group allows less. Where the system does not tell
    (macOS) it is half of all memory.

    Args:
        root: where ``proc`` and ``sys`` are found; another folder in tests.
    """
    return max(0, min([_available(root), *_memory_left(root)]))


def total_memory_bytes(root: Path = _ROOT) -> int:
    """Memory that this process could ever have, in bytes: the machine's, or what a control group allows.

    Unlike ``free_memory_bytes`` it is the same whatever else runs.

    Args:
        root: where ``proc`` and ``sys`` are found; another folder in tests.
    """
    return min([_physical(root), *(limit for _, limit in _memory_limits(root))])


def peak_memory_bytes(root: Path = _ROOT) -> int | None:
    """The most memory (resident set) that this process has held so far, in bytes; None where the system tells not.

    Args:
        root: where ``proc`` is found; another folder in tests.
    """
    for line in _text(root / "proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _available(root: Path) -> int:
    found = _meminfo(root, "MemAvailable")
    if found is not None:
        return found
    return _of_windows("available") if sys.platform == "win32" else _physical(root) // 2


def _physical(root: Path) -> int:
    found = _meminfo(root, "MemTotal")
    if found is not None:
        return found
    if sys.platform == "win32":
        return _of_windows("total")
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return _UNKNOWN


def _meminfo(root: Path, field: str) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _of_windows(field: str) -> int:
    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            *((name, ctypes.c_uint64) for name in ("total", "available", "b", "c", "d", "e", "f")),
        )

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    kernel32 = ctypes.CDLL("kernel32")
    return int(getattr(status, field)) if kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else _UNKNOWN


def _core_quotas(root: Path) -> Iterator[float]:
    for group in _groups(root, "cpu"):
        quota, _, period = _text(group / "cpu.max").partition(" ")  # version 2: "max 100000" or "250000 100000"
        if not quota:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if (parts := _number(quota)) is not None and parts > 0 and (whole := _number(period)):
            yield parts / whole


def _memory_left(root: Path) -> Iterator[int]:
    """What each control group above this process has left; file pages that can be dropped count as left."""
    for group, limit in _memory_limits(root):
        used = _number(_text(group / "memory.current") or _text(group / "memory.usage_in_bytes"))
        if used is not None:
            yield limit - used + _droppable(group)


def _memory_limits(root: Path) -> Iterator[tuple[Path, int]]:
    for group in _groups(root, "memory"):
        limits = [_number(_text(group / name)) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        limit = min((value for value in limits if value is not None), default=_UNLIMITED)
        if limit < _UNLIMITED:
            yield group, limit


def _droppable(group: Path) -> int:
    fields = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    return _number(fields.get("total_inactive_file", fields.get("inactive_file", ""))) or 0


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of all that it lies in, in both versions.

    In a container the path that ``/proc`` tells may be the host's, of which only the last part is mounted, as the
    root of the mount: parts that are not there are left out.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2, alone or beside version 1
            mounts = [root / _GROUPS, root / _GROUPS / "unified"]
        elif controller in controllers.split(","):
            mounts = [root / _GROUPS / controllers]
            if controllers != controller:
                mounts.append(root / _GROUPS / controller)
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            yield from dict.fromkeys(mount / part for part in (inside, *inside.parents))


def _text(path: Path) -> str:
    """The content of a small system file, "" if it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:  # "", or "max"
        return None
