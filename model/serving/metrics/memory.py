"""How much memory this process takes and may take, in bytes, as Linux tells; None where it does not."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

STATUS = Path("/proc/self/statm")
GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def resident() -> int | None:
    """Resident memory of this process."""
    try:
        return int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


@cache
def memory_limit() -> int | None:
    """The container's limit, or the machine's memory where there is none; it does not change while a process lives."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
    for path in GROUP_LIMITS:
        try:
            return min(machine, int(path.read_text()))
        except (OSError, ValueError):  # no such file, or `max`
            continue
    return machine
