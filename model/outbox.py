"""A bounded buffer that a background thread sends in batches: for writes that must not delay whoever makes them.

The destination (a tracking store, a database) may be slow or down for minutes. Items that cannot be sent are kept and
retried with a growing pause; when the buffer is full, the oldest are dropped and counted.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from model.errors import one_line

BATCH = 900
"""Items sent at once; MLflow takes at most 1,000 a request."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Leftover(Generic[Item]):
    """What could not be sent."""

    items: tuple[Item, ...]
    files: dict[str, str]
    """Path → text."""
    dropped: int
    """Items that were lost because the buffer was full."""
    error: str | None
    """The last failure, where there was one after the last success."""


class Outbox(Generic[Item]):
    """Send items, and small text files, in order from one background thread.

    `send_items` and `send_file` are called from that thread only; any exception counts as a failed attempt.
    `period`: seconds between two batches. `limit`: most items kept. `first_pause` and `longest_pause`: seconds before
    the next attempt after a failure; the pause doubles from one to the other. `on_failure` gets the first error of
    each series of failures, and `on_recovery` is called after the first success that follows.
    """

    def __init__(
        self,
        send_items: Callable[[list[Item]], None],
        send_file: Callable[[str, str], None] = lambda path, text: None,
        *,
        period: float = 5.0,
        limit: int = 100_000,
        first_pause: float = 10.0,
        longest_pause: float = 300.0,
        on_failure: Callable[[str], None] = lambda error: None,
        on_recovery: Callable[[], None] = lambda: None,
    ) -> None:
        self._send_items, self._send_file = send_items, send_file
        self._period, self._limit = period, limit
        self._first_pause, self._longest_pause = first_pause, longest_pause
        self._on_failure, self._on_recovery = on_failure, on_recovery
        self._items: deque[Item] = deque()
        self._sending: list[Item] = []
        self._files: dict[str, str] = {}
        self._dropped = 0
        self._error: str | None = None
        self._woken = self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def add(self, items: Iterable[Item]) -> None:
        """Queue items and return at once."""
        with self._changed:
            self._items.extend(items)
            while len(self._items) > self._limit:
                self._items.popleft()
                self._dropped += 1
            if len(self._items) >= BATCH:
                self._wake()

    def state(self) -> tuple[int, int]:
        """Return (items waiting to be sent, items dropped)."""
        with self._changed:
            return len(self._sending) + len(self._items), self._dropped

    def add_file(self, path: str, text: str) -> None:
        """Queue a file; a newer text for the same path replaces one that was not sent yet."""
        with self._changed:
            self._files[path] = text

    def flush(self) -> None:
        """Request a batch soon, without waiting for it; a pause after a failure is kept."""
        with self._changed:
            self._wake()

    def close(self, timeout: float = 60.0) -> Leftover[Item]:
        """Try once more to send everything, for at most `timeout` seconds, and return what is left."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            error = self._error
            if self._thread.is_alive():
                error = f"no answer in {timeout:g} s"
            items = (*self._sending, *self._items)
            return Leftover(items, dict(self._files), self._dropped, error)

    def _wake(self) -> None:
        self._woken = True
        self._changed.notify()

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing, pause)
                self._changed.wait_for(lambda: self._closing or self._woken, self._period)
                self._woken = False
                closing = self._closing
            try:
                self._drain()
            except Exception as error:  # whatever a store, a driver or a network may raise
                pause = min(self._longest_pause, 2 * pause or self._first_pause)
                first = self._error is None
                self._error = one_line(error)
                if first:
                    self._on_failure(self._error)
            else:
                pause = 0.0
                if self._error is not None:
                    self._error = None
                    self._on_recovery()
            if closing:
                return

    def _drain(self) -> None:
        while True:
            with self._changed:
                count = min(BATCH, len(self._items))
                self._sending = [self._items.popleft() for _ in range(count)]
            if not self._sending:
                break
            try:
                self._send_items(self._sending)
            except BaseException:
                with self._changed:
                    self._items.extendleft(reversed(self._sending))
                    self._sending = []
                raise
            with self._changed:
                self._sending = []
        while True:
            with self._changed:
                path = next(iter(self._files), None)
                text = "" if path is None else self._files[path]
            if path is None:
                return
            self._send_file(path, text)
            with self._changed:
                if self._files.get(path) == text:
                    del self._files[path]
