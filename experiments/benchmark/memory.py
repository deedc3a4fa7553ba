"""Memory of the processes that serve, sampled while requests run.

The resident set counts pages that processes share once for each of them, so for a server of several workers the
sum is an upper bound.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
MB = 1e6


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The peak of the resident sets' sum."""

    peak_rss_mb: float
    """10⁶ bytes."""
    memory_percent: float
    """The same as a share of the memory that there is."""
    samples: int


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
    """Samples the given processes and their children from a thread, for as long as its context is open.

    `peak` is None when there was none to look at.
    """

    def __init__(self, processes: Sequence[int], *, every: float = 0.05) -> None:
        self.peak: MemoryUse | None = None
        self._every = every
        self._total = usable_memory()
        self._samples = 0
        self._most = 0
        self._done = threading.Event()
        self._processes = []
        for pid in processes:
            with suppress(psutil.Error):
                self._processes.append(psutil.Process(pid))
        self._thread = threading.Thread(target=self._run, name="memory watch", daemon=True)

    def __enter__(self) -> Self:
        if self._processes:
            self._look()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._processes:
            self._done.set()
            self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self._every):
            self._look()
        self._look()

    def _look(self) -> None:
        total = 0
        for process in self._processes:
            with suppress(psutil.Error):  # one that has ended uses nothing
                total += process.memory_info().rss
            with suppress(psutil.Error):
                for child in process.children(recursive=True):
                    with suppress(psutil.Error):
                        total += child.memory_info().rss
        if total:
            self._samples += 1
            self._most = max(self._most, total)
            self.peak = MemoryUse(self._most / MB, 100 * self._most / self._total, self._samples)
