"""Whether a service that failed is worth another try: a circuit breaker (Nygard, Release It!, 2007).

Closed, every story may use the service. After several failures in a row it opens, and nobody waits for the
service any more. After a pause it is half open: one probe, for which no reader waits, finds out whether the
service is back. Its success closes the breaker, its failure starts the pause again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]


class Breaker:
    """The state of one service. Used from one event loop."""

    def __init__(self, limit: int, pause: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`limit`: failures in a row that open it. `pause`: seconds from then to the probe."""
        self._limit = limit
        self._pause = pause
        self._clock = clock
        self._opened_at: float | None = None
        self._probing = False
        self.failures = 0
        """Failures in a row."""
        self.reason = ""
        """What the last failure was, for an operator."""

    @property
    def state(self) -> State:
        """`half-open` while a probe is on its way."""
        if self._opened_at is None:
            return "closed"
        return "half-open" if self._probing else "open"

    @property
    def closed(self) -> bool:
        """Whether stories may use the service."""
        return self._opened_at is None

    @property
    def wait(self) -> float:
        """Seconds until the next probe is due; 0 when it is due, or none is needed."""
        if self._opened_at is None:
            return 0.0
        return max(0.0, self._opened_at + self._pause - self._clock())

    def succeeded(self) -> None:
        """The service did its part: use it again."""
        self.failures = 0
        self.reason = ""
        self._opened_at = None
        self._probing = False

    def failed(self, reason: str, *, slow: bool = False) -> None:
        """The service failed. A slow failure opens at once: each further one would cost a reader that wait.

        A story that was begun before the breaker opened, and fails after it did, does not prolong the pause.
        """
        self.failures += 1
        self.reason = reason
        if self._opened_at is None and (slow or self.failures >= self._limit):
            self._opened_at = self._clock()

    def probe(self) -> bool:
        """Take the right to probe, if the pause is over and nobody else probes; tell the outcome afterwards."""
        if self._opened_at is None or self._probing or self.wait > 0:
            return False
        self._probing = True
        return True

    def probe_failed(self, reason: str) -> None:
        """The probe found the service still down: pause again."""
        self.failures += 1
        self.reason = reason
        self._probing = False
        if self._opened_at is not None:
            self._opened_at = self._clock()
