"""Threads follow the container's quota, whichever way the kernel states it."""

from __future__ import annotations

import os

import pytest

from lastrerank.cpus import available_cpus

HERE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def groups(root, files, lines):
    for name, text in files.items():
        (root / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "fs" / name).write_text(text)
    (root / "self").write_text(lines)
    return available_cpus(root / "fs", root / "self")


@pytest.mark.parametrize(
    "files, lines, expected",
    [({"cpu.max": "100000 100000\n"}, "0::/\n", 1), ({"cpu.max": "50000 100000\n"}, "0::/\n", 1),
     ({"cpu.max": "max 100000\n"}, "0::/\n", HERE), ({"cpu.max": "99900000 100000\n"}, "0::/\n", HERE),
     ({}, "", HERE), ({"cpu.max": "nonsense"}, "0::/\n", HERE),
     ({"cpu.max": "max 100000", "a/cpu.max": "100000 100000", "a/b/cpu.max": "max 1000"}, "0::/a/b\n", 1),
     ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/\n", 1),
     ({"cpu,cpuacct/x/cpu.cfs_quota_us": "100000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
      "4:cpu,cpuacct:/x\n", 1),
     ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/\n", HERE),
     ({"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "0"}, "4:cpu:/\n", HERE)],
)  # fmt: skip
def test_the_smallest_quota_holds(tmp_path, files, lines, expected):
    assert groups(tmp_path, files, lines) == expected
