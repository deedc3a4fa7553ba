"""What a worker process does around each task, so that it takes nothing from the process that serves."""

import contextlib
import os
import signal
from collections.abc import Iterator

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
NICENESS = 10


@contextlib.contextmanager
def background(idle_timeout: float) -> Iterator[None]:
    """Run a task of a worker process: with a low priority and one thread.

    After `idle_timeout` seconds without a task the process ends.
    """
    signal.setitimer(signal.ITIMER_REAL, 0)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    with contextlib.suppress(OSError):  # it is one already
        os.setsid()  # Ctrl-C in the terminal is for the app
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, idle_timeout)
