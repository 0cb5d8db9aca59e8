"""How many threads this process may keep busy: its affinity, and the quota of the container that it runs in."""

from __future__ import annotations

import os
from pathlib import Path


def available_cpus(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs, at least 1. More threads than a quota allows are stopped together for the rest of every period, which is
    slower than fewer threads are.

    Args:
        root: where control groups are mounted (version 2, or version 1's `cpu` beneath).
        own: which groups this process is in.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _groups(root, own) if (quota := _quota(folder)) is not None]
    return max(1, int(min([affinity, *quotas])))


def _groups(root: Path, own: Path) -> list[Path]:
    """This process's groups and all above them: the smallest quota holds."""
    found = {root, root / "cpu", root / "cpu,cpuacct"}
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return list(found)
    for line in lines:
        _, controllers, path = line.split(":", 2)  # version 2 has no controllers
        base = root / controllers
        while path.strip("/"):
            found.add(base / path.strip("/"))
            path = path.rpartition("/")[0]
    return list(found)


def _quota(folder: Path) -> float | None:
    """Of a group, in CPUs; None for none."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = ((folder / f"cpu.cfs_{x}_us").read_text(encoding="ascii") for x in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max", -1, or no such file
        return None
