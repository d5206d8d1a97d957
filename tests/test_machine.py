"""Cores and memory: what the process may use, not what the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medseg import machine
from medseg.machine import free_memory_bytes, total_memory_bytes, usable_cores

GIB = 2**30


@pytest.fixture
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def tree(root: Path, **files: str) -> Path:
    """A folder with ``proc/meminfo`` of 120 GiB, 100 of them free, and files named as path with ``__`` for ``/``."""
    memory = f"MemTotal: {120 * 2**20} kB\nMemAvailable:  {100 * 2**20} kB\n"
    for name, text in ({"proc__meminfo": memory} | files).items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(root: Path, path: str, **files: str) -> Path:
    """A tree with control groups of version 2, ``files`` named as ``folder__controller_file``."""
    base = "sys__fs__cgroup__"
    tree(root, proc__self__cgroup=f"0::{path}\n")
    return tree(root, **{base + name.replace("cpu_", "cpu.").replace("mem_", "memory."): f"{text}\n"
                         for name, text in files.items()})  # fmt: skip


def test_without_limits_it_is_affinity_and_available_memory(tmp_path, sixteen_cores):
    root = tree(tmp_path)
    assert usable_cores(root) == 16
    assert free_memory_bytes(root) == 100 * GIB
    assert total_memory_bytes(root) == 120 * GIB


def test_all_memory_is_what_the_tightest_group_allows_whatever_is_in_use(tmp_path):
    for used in (1, 30):
        files = {"a__mem_max": str(40 * GIB), "a__b__mem_max": "max", "a__mem_current": str(used * GIB)}
        root = v2(tmp_path, "/a/b", **files)
        assert total_memory_bytes(root) == 40 * GIB
        assert free_memory_bytes(root) == (40 - used) * GIB


def test_the_real_machine_gives_something_that_can_be_worked_with():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert 10 * 2**20 < free_memory_bytes() <= total_memory_bytes() < 2**50


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 16), ("250000 100000", 2), ("50000 100000", 1), ("3200000 100000", 16), ("", 16)],
)
def test_a_quota_of_version_2_counts_rounded_down(tmp_path, sixteen_cores, quota, cores):
    assert usable_cores(v2(tmp_path, "/job", job__cpu_max=quota)) == cores


def test_the_tightest_group_on_the_way_up_counts(tmp_path, sixteen_cores):
    files = {"a__b__cpu_max": "max 100000", "a__cpu_max": "400000 100000", "cpu_max": "800000 100000"}
    root = v2(tmp_path, "/a/b", **files, a__b__mem_max="max", a__mem_max=str(8 * GIB), a__mem_current=str(3 * GIB))
    assert usable_cores(root) == 4
    assert free_memory_bytes(root) == 5 * GIB


def test_in_a_container_the_mount_is_the_group(tmp_path, sixteen_cores):
    """/proc tells the host's path, which is not mounted; the group's own files lie at the top."""
    root = v2(tmp_path, "/docker/0123", cpu_max="200000 100000", mem_max=str(4 * GIB), mem_current=str(GIB))
    assert usable_cores(root) == 2
    assert free_memory_bytes(root) == 3 * GIB


def test_file_pages_that_can_be_dropped_are_free_and_the_high_mark_is_a_limit(tmp_path):
    files = {"mem_max": str(9 * GIB), "mem_high": str(8 * GIB), "mem_current": str(7 * GIB)}
    root = v2(tmp_path, "/", **files, mem_stat=f"anon 5\ninactive_file {2 * GIB}\nactive_file 9")
    assert free_memory_bytes(root) == 3 * GIB


def test_groups_of_version_1_are_read_too(tmp_path, sixteen_cores):
    base = "sys__fs__cgroup__"
    files = {
        "proc__self__cgroup": "4:memory:/job\n2:cpu,cpuacct:/job\n1:cpuset:/\n0::/\n",
        base + "cpu,cpuacct__job__cpu.cfs_quota_us": "300000\n",
        base + "cpu,cpuacct__job__cpu.cfs_period_us": "100000\n",
        base + "cpu,cpuacct__cpu.cfs_quota_us": "-1\n",
        base + "memory__memory.limit_in_bytes": "9223372036854771712\n",
        base + "memory__memory.usage_in_bytes": "1000\n",
        base + "memory__job__memory.limit_in_bytes": f"{6 * GIB}\n",
        base + "memory__job__memory.usage_in_bytes": f"{5 * GIB}\n",
        base + "memory__job__memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
    }
    root = tree(tmp_path, **files)
    assert usable_cores(root) == 3
    assert free_memory_bytes(root) == 2 * GIB


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path):
    assert free_memory_bytes(v2(tmp_path, "/", mem_max="1000", mem_current="2000")) == 0


@pytest.mark.parametrize("text", ["", "nonsense", "0::/x\n\n::\n:", "0::/../../..\n"])
def test_unreadable_groups_limit_nothing(tmp_path, sixteen_cores, text):
    root = tree(tmp_path, proc__self__cgroup=text, sys__fs__cgroup__cpu_max="garbage")
    assert usable_cores(root) == 16
    assert free_memory_bytes(root) == 100 * GIB


def test_where_the_system_does_not_say_it_is_half_of_all_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_memory_bytes(tmp_path) == 1000 * 4096 // 2


def test_systems_without_affinity_count_their_cores(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path) == 1
