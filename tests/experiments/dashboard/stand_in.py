"""What stands in for MLflow in the reading process where a test is about waiting, failing and dying, on demand."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from experiments.dashboard.records import SampleSet

asked = 0


def ask(uri: str, idle_timeout: float, question: str, run: str) -> tuple[Any, str | None, int]:
    """Answer with the number of the question and this process's id; `run` says what to do instead."""
    global asked
    signal.setitimer(signal.ITIMER_REAL, 0)
    asked += 1
    if run == "dies" or (run == "dies if not the first" and asked > 1):
        os._exit(3)
    if run == "fails":
        return None, "sqlite:////srv/lily.db is locked", os.getpid()
    time.sleep(3600 if run == "hangs" else 0.05)
    signal.setitimer(signal.ITIMER_REAL, idle_timeout)
    return [SampleSet(step=asked, tokens=os.getpid(), bits_per_byte=None, stories=(("A", run),))], None, os.getpid()
