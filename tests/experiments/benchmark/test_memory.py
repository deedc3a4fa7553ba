"""Memory of real processes: the peak is seen, children count, and a container's limit is respected."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from experiments.benchmark.memory import MemoryWatch, listening_processes, usable_memory
from tests.model.engines import until

PEAK = """
import sys, time
print("up", flush=True)
sys.stdin.readline()
block = b"x" * 80_000_000
print("full", flush=True)
sys.stdin.readline()
del block
print("empty", flush=True)
sys.stdin.readline()
"""
CHILD = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]])"


def said(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == word


def next_part(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("command", [["-c", PEAK], ["-c", CHILD, PEAK]], ids=["itself", "its child"])
def test_the_peak_is_kept_when_the_memory_is_given_back(command: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        said(process, "up")
        with MemoryWatch([process.pid], every=0.01) as watch:
            before = watch.peak
            next_part(process)
            said(process, "full")
            seen = watch.samples
            until(lambda: watch.samples > seen + 1)  # the one that is under way may have begun before
            next_part(process)
            said(process, "empty")
        next_part(process)
    assert before > 0
    assert (watch.peak - before) / 1e6 == pytest.approx(80, abs=8)
    figures = watch.figures()
    assert figures["peak_rss_mb"].value == watch.peak / 1e6
    assert figures["memory_percent"].value == pytest.approx(100 * watch.peak / usable_memory())
    assert {figure.n for figure in figures.values()} == {watch.samples}
    assert watch.samples > 1


def test_this_process_is_measured_as_psutil_does() -> None:
    with MemoryWatch([os.getpid()]) as watch:
        pass
    me = psutil.Process()  # other tests of this process may have left children that are still at work
    now = sum(process.memory_info().rss for process in (me, *me.children(recursive=True))) / 1e6
    assert watch.peak / 1e6 == pytest.approx(now, rel=0.2)


def test_a_process_that_is_gone_or_unknown_leaves_no_figure() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for processes in ([], [ended.pid]):
        with MemoryWatch(processes) as watch:
            pass
        assert watch.figures() == {}


@pytest.mark.parametrize(
    ("text", "expected"), [("1000000000\n", 1_000_000_000), ("max\n", None), ("9" * 18, None), (None, None)]
)
def test_a_containers_limit_counts_where_it_is_smaller(text: str | None, expected: int | None, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    if text is not None:
        limit.write_text(text)
    assert usable_memory(limit) == (expected or psutil.virtual_memory().total)


def test_whoever_listens_at_a_port_is_found() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert listening_processes(port) == []
        listener.listen()
        assert listening_processes(port) == [os.getpid()]
