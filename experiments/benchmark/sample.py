"""What one request leaves behind: its times, its tokens, and how it ended. All figures come from these rows.

Times are seconds since the run began, on one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Phase = Literal["cold", "warmup", "single", "concurrent", "stress", "open", "compare"]
PHASES: tuple[Phase, ...] = get_args(Phase)

FailureKind = Literal["refused", "busy", "timeout", "rejected", "http_5xx", "cut", "malformed", "error"]
FAILURES: tuple[FailureKind, ...] = get_args(FailureKind)
"""`refused`: nobody listens, or the connection could not be made. `busy`: 429, or 503 with `Retry-After`.
`timeout`: not done in the time allowed. `rejected`: another 4xx. `http_5xx`: the server failed before it wrote.
`cut`: the stream ended in mid-story. `malformed`: what came is not the contract's. `error`: the server said
that the story broke off."""


@dataclass(slots=True, kw_only=True)
class Sample:
    """One request."""

    phase: Phase
    level: int
    """Requests kept open at once; 0 in the open loop."""
    number: int
    """Which request of its phase (and level) it is, from 0."""
    seed: int
    scheduled: float
    """When it was due. In a closed loop that is when it was sent."""
    started: float
    """When it was sent."""
    arrivals: list[float] = field(default_factory=list)
    """When each message that brought tokens came."""
    counts: list[int] = field(default_factory=list)
    """Tokens that each of them brought, as far as the target says so; 0 where only `tokens` is known."""
    ended: float = 0.0
    """When it was known how the story ended, or that it failed."""
    tokens: int = 0
    """As counted by the server's usage or by token ids, never by messages."""
    finish: str = ""
    """`stop` or `length`; empty for a failure."""
    error: FailureKind | None = None
    message: str = ""
    """The failure in one line."""
    target: str = "target"
    """`target`, or `against` for the other side of a comparison."""

    @property
    def ok(self) -> bool:
        """The whole story came."""
        return self.error is None

    @property
    def first(self) -> float | None:
        """When the first token came."""
        return self.arrivals[0] if self.arrivals else None

    @property
    def last(self) -> float | None:
        """When the last token came."""
        return self.arrivals[-1] if self.arrivals else None

    @property
    def generation_time(self) -> float:
        """Seconds from when it was due until the story was whole."""
        return self.ended - self.scheduled

    @property
    def ttft(self) -> float | None:
        """Time to first token: seconds from when it was due."""
        return None if self.first is None else self.first - self.scheduled

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: seconds between messages that brought tokens, the first one's excepted."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds: the mean pace, however tokens were packed."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)
