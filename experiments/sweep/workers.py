"""Several workers on this machine, each a process with its own threads, which meet only in the study."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from experiments.sweep.objective import Tell
from experiments.sweep.worker import STOPPED, Order, as_json

ROOT = Path(__file__).resolve().parents[2]
RESTARTS = 3
"""Workers that are replaced, at most, after something has killed them."""


def run_workers(order: Order, count: int, tell: Tell, stopping: Callable[[], bool]) -> int:
    """Run `count` workers to their ends; returns 0 or the first exit code that is not.

    A worker that was killed is replaced, and its trial is tried again. When `stopping` says so all are asked to save
    and stop, and get all the time that they need for it.
    """
    workers = [_start(order) for _ in range(count)]
    codes: list[int] = []
    restarts, asked = RESTARTS, False
    try:
        while workers:
            if stopping() and not asked:
                asked = True
                for worker in workers:
                    worker.send_signal(signal.SIGTERM)
            for worker in [worker for worker in workers if worker.poll() is not None]:
                workers.remove(worker)
                if worker.returncode < 0 and not asked and restarts:
                    restarts -= 1
                    tell(f"a worker was killed by signal {-worker.returncode}; another takes its place")
                    workers.append(_start(order))
                elif worker.returncode < 0:
                    codes.append(STOPPED if asked else 1)
                else:
                    codes.append(worker.returncode)
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return STOPPED if asked else next((code for code in codes if code), 0)


def _start(order: Order) -> subprocess.Popen[bytes]:
    """Away from the terminal's Ctrl-C, which reaches the sweep alone, and is passed on by it."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep.worker"],
        stdin=subprocess.PIPE,
        env=os.environ
        | {"OMP_NUM_THREADS": str(order.threads), "PYTHONPATH": os.pathsep.join([str(ROOT), *_path()])},
        start_new_session=True,
    )
    assert worker.stdin is not None
    worker.stdin.write(as_json(order).encode())
    worker.stdin.close()
    return worker


def _path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
