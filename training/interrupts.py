"""Stop long work at its next step on Ctrl-C or SIGTERM, instead of raising in the middle of it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class StopFlag:
    """A flag without a lock.

    A signal handler runs in the main thread, in the middle of whatever that does. With a `threading.Event`, a second
    signal that arrives while the first one is being handled waits for a lock that is never released.
    """

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set


@contextlib.contextmanager
def stop_on_signals(stop: StopFlag | None = None) -> Iterator[StopFlag]:
    """Set `stop` on Ctrl-C and SIGTERM while inside; outside the main thread nothing can be caught."""
    stop = stop or StopFlag()
    previous: dict[int, Any] = {}

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
