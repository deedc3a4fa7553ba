"""What is on its way to the tracking store: a bounded buffer, emptied by a thread of its own.

A store may be slow or gone (a locked SQLite file is waited for 20 s, a server that is down is tried for
minutes), and none of that may hold up or end a training run that costs hours. So whoever measures only puts
its points down here. What cannot be sent is kept and tried again, less and less often; what does not fit any
more is dropped oldest first, and counted.
"""

from __future__ import annotations

import json
import os
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

BATCH = 900
"""Points sent at once; MLflow takes at most 1,000 things a request."""


class Point(NamedTuple):
    """One value of one curve."""

    key: str
    value: float
    timestamp: int
    """Milliseconds since 1970, when it was measured."""
    step: int


Item = TypeVar("Item")
"""What an outbox carries: a training run's points, or what readers did."""


@dataclass(frozen=True, slots=True)
class Leftover(Generic[Item]):
    """What could not be sent."""

    points: tuple[Item, ...]
    files: dict[str, str]
    """Path in the run's artifacts → text."""
    dropped: int
    """Points that were lost because the buffer was full."""
    error: str | None
    """The last failure, where there was one after the last success."""


def write_leftover(path: Path, leftover: Leftover[Point]) -> None:
    """Keep what was not sent, a point or a file a line; the file is there whole or not at all."""
    lines = [json.dumps({"point": point}) for point in leftover.points]
    lines += [json.dumps({"path": name, "text": text}) for name, text in leftover.files.items()]
    fresh = path.with_name(path.name + ".new")
    fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(fresh, path)


def read_leftover(path: Path) -> tuple[list[Point], dict[str, str]]:
    """What `write_leftover` kept; a damaged file is a `ValueError`, a `TypeError` or a `KeyError`."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    points = [Point(*line["point"]) for line in lines if "point" in line]
    return points, {line["path"]: line["text"] for line in lines if "point" not in line}


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, its end cut off where it is very long."""
    return textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__


class Outbox(Generic[Item]):
    """Sends points and small text files in order from one thread; `send_*` are called from that thread only.

    Whatever they raise counts as a failure to send. `period`: seconds between sendings when all is well.
    `limit`: most points kept. `first_pause` and `longest_pause`: seconds before the next try after a failure;
    the pause doubles from one to the other. `on_failure` is told the first failure of each series, and
    `on_recovery` is called after the first success that follows.
    """

    def __init__(
        self,
        send_points: Callable[[list[Item]], None],
        send_file: Callable[[str, str], None],
        *,
        period: float = 5.0,
        limit: int = 100_000,
        first_pause: float = 10.0,
        longest_pause: float = 300.0,
        on_failure: Callable[[str], None] = lambda error: None,
        on_recovery: Callable[[], None] = lambda: None,
    ) -> None:
        self._send_points, self._send_file = send_points, send_file
        self._period, self._limit = period, limit
        self._first_pause, self._longest_pause = first_pause, longest_pause
        self._on_failure, self._on_recovery = on_failure, on_recovery
        self._points: deque[Item] = deque()
        self._sending: list[Item] = []
        self._files: dict[str, str] = {}
        self._dropped = 0
        self._error: str | None = None
        self._asked = self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tracking outbox", daemon=True)
        self._thread.start()

    def add(self, points: Iterable[Item]) -> None:
        """Put points down; returns at once."""
        with self._changed:
            self._points.extend(points)
            while len(self._points) > self._limit:
                self._points.popleft()
                self._dropped += 1
            if len(self._points) >= BATCH:
                self._ask()

    def state(self) -> tuple[int, int]:
        """Points that are still to be sent, and points that were lost."""
        with self._changed:
            return len(self._sending) + len(self._points), self._dropped

    def add_file(self, path: str, text: str) -> None:
        """Put a file down; a newer text for the same path replaces one that was not sent yet."""
        with self._changed:
            self._files[path] = text

    def flush(self) -> None:
        """Ask for a sending soon, without waiting for it; a pause after a failure is kept."""
        with self._changed:
            self._ask()

    def close(self, timeout: float = 60.0) -> Leftover[Item]:
        """Try once more to send everything, wait at most `timeout` seconds for it, and tell what is left."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            error = self._error
            if self._thread.is_alive():
                error = f"no answer in {timeout:g} s"
            points = (*self._sending, *self._points)
            return Leftover(points, dict(self._files), self._dropped, error)

    def _ask(self) -> None:
        self._asked = True
        self._changed.notify()

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing, pause)
                self._changed.wait_for(lambda: self._closing or self._asked, self._period)
                self._asked = False
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
                count = min(BATCH, len(self._points))
                self._sending = [self._points.popleft() for _ in range(count)]
            if not self._sending:
                break
            try:
                self._send_points(self._sending)
            except BaseException:
                with self._changed:
                    self._points.extendleft(reversed(self._sending))
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
