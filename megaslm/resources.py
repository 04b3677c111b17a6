"""What of the machine this process may use: cores and memory, by its control groups too, as containers set them."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS, CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Cores that this process may use, by its affinity and by the CPU time that its control groups may take."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(map(_quota, _control_groups("cpu")), default=math.inf)
    return max(1, math.ceil(min(cores, quota)))


def available_memory() -> int:
    """Bytes that this process may still take: of the machine's memory, and of what its control groups may take."""
    import psutil

    free = psutil.virtual_memory().available
    return max(0, min([free, *map(_room, _control_groups("memory"))]))


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group and those above it, in which a limit may stand."""
    try:
        lines = CGROUPS.read_text().splitlines()
    except OSError:
        lines = []  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP_ROOT / controller if controllers else CGROUP_ROOT  # version 1 has a tree for each controller
        group = root / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _quota(group: Path) -> float:
    """Cores' worth of CPU time: of "QUOTA PERIOD" in cpu.max (version 2), or of two files (version 1)."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # a file that is not there, or "max"
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
            return quota / period if quota > 0 else math.inf
    return math.inf


def _room(group: Path) -> float:
    """Bytes up to the limit of a group; what its page cache could give back counts as free."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # a file that is not there, or "max"
            room = int((group / limit).read_text()) - int((group / used).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return room + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    return math.inf
