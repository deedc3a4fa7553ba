"""Memory of the processes that serve, sampled while requests run.

Resident sets count shared pages once for each process, so the sum is an upper bound for a server of several workers.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from experiments.benchmark.measures import Figure, Figures

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
MB = 1e6


def usable_memory(limit_file: Path = CGROUP_LIMIT) -> int:
    """Bytes of memory that this machine has, or that its container may use where that is less."""
    total = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):
        return min(total, int(limit_file.read_text("ascii")))
    return total


def listening_processes(port: int) -> list[int]:
    """Ids of this machine's processes that listen on a TCP port, as far as this user may see them."""
    found = set()
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                found.add(int(connection.pid))
    return sorted(found)


class MemoryWatch:
    """Samples the given processes and their children from a thread, for as long as its context is open."""

    def __init__(self, processes: Sequence[int], *, every: float = 0.05) -> None:
        self.peak = self.samples = 0
        """The largest sum of resident sets, in bytes, and how often it was looked at."""
        self._every = every
        self._total = usable_memory()
        self._done = threading.Event()
        self._processes = []
        for pid in processes:
            with suppress(psutil.Error):
                self._processes.append(psutil.Process(pid))
        self._thread = threading.Thread(target=self._run, name="memory watch", daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self._every):
            self._look()
        self._look()

    def _look(self) -> None:
        used = 0
        for process in self._processes:
            family = [process]
            with suppress(psutil.Error):
                family += process.children(recursive=True)
            for member in family:
                with suppress(psutil.Error):  # one that has ended uses nothing
                    used += member.memory_info().rss
        if used:
            self.peak, self.samples = max(self.peak, used), self.samples + 1

    def figures(self) -> Figures:
        """The peak in 10⁶ bytes, and in percent of the memory that there is; empty if no process was there."""
        values = {"peak_rss_mb": self.peak / MB, "memory_percent": 100 * self.peak / self._total}
        return {name: Figure(value, self.samples) for name, value in values.items()} if self.samples else {}
