"""What one request leaves behind, and the definitions of all figures as functions of these rows.

They follow vLLM's `bench serve`. Of the requests that succeeded:

- TTFT: from when the request was due to the first message with tokens.
- ITL: from one message with tokens to the next, all gaps of all requests in one pool.
- TPOT: (last token − first token) / (tokens − 1), one value a request.
- generation time (vLLM's E2EL): from when it was due until the story was complete.
- throughput: their tokens, over the time from the first due request to the last end.
- goodput: requests within both limits (TTFT, TPOT), a second; and as a share of all requests.

"Due" is when the request was sent in a closed loop, and its scheduled time in the open loop. A figure without
observations is left out: it was not measured. Percentiles interpolate linearly. Times are seconds since the run began,
on one monotonic clock.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Phase = Literal["cold", "warmup", "single", "concurrent", "stress", "open", "compare"]
FailureKind = Literal["refused", "busy", "timeout", "rejected", "http_5xx", "truncated", "malformed", "error"]
"""`refused`: no connection. `busy`: 429, or 503 with `Retry-After`. `timeout`: not done in the time allowed.
`rejected`: another 4xx. `http_5xx`: the server failed before the first token. `truncated`: the stream ended early.
`malformed`: the answer breaks the protocol. `error`: the server reported a failed generation."""
COUNTED: tuple[Phase, ...] = ("single", "concurrent", "open")
"""Phases whose requests make up generation times and success rate. Warm-up is excluded, a cold start has its own
figure, and the stress phase overloads the target on purpose."""
LATENCY_PHASES: tuple[Phase, ...] = ("open", "concurrent", "single")
"""TTFT, ITL, TPOT and goodput come from the first of these that was run."""


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
    """When each message with tokens came."""
    counts: list[int] = field(default_factory=list)
    """Tokens of each of these messages; 0 where the target states only the total."""
    ended: float = 0.0
    """When the end of the story, or its failure, was known."""
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
        return self.error is None

    @property
    def first(self) -> float | None:
        return self.arrivals[0] if self.arrivals else None

    @property
    def last(self) -> float | None:
        return self.arrivals[-1] if self.arrivals else None

    @property
    def generation_time(self) -> float:
        """Seconds from when it was due until the story was complete."""
        return self.ended - self.scheduled

    @property
    def ttft(self) -> float | None:
        """Time to first token: seconds from when it was due."""
        return None if self.first is None else self.first - self.scheduled

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: seconds between messages with tokens."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds, however tokens were packed into messages."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Listener:
    """Writes what happens to a request into its row; each method is called at the moment that it describes."""

    sample: Sample
    now: Callable[[], float]

    def arrived(self, tokens: int) -> None:
        """A message brought so many tokens; 0: the target does not say how many."""
        self.sample.arrivals.append(self.now())
        self.sample.counts.append(tokens)

    def complete(self) -> None:
        """The target said that the story has ended; closing the stream is not part of its time."""
        self.sample.ended = self.now()


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, and how many observations it stands on."""

    value: float
    n: int


Figures = dict[str, Figure]


def wall_time(samples: Sequence[Sample]) -> float:
    """Seconds from the first due request to the last end; 0 for none."""
    if not samples:
        return 0.0
    return max(sample.ended for sample in samples) - min(sample.scheduled for sample in samples)


def is_good(sample: Sample, ttft_limit: float, itl_limit: float) -> bool:
    """Whether the story arrived complete, with TTFT within `ttft_limit` and TPOT within `itl_limit`.

    A story without tokens begins when it ends; one of a single token has no TPOT.
    """
    begun = sample.generation_time if sample.ttft is None else sample.ttft
    return sample.ok and begun <= ttft_limit and (sample.tpot or 0.0) <= itl_limit


def most_at_once(samples: Iterable[Sample]) -> int:
    """The largest number of successful streams that were open at once, from first token to end."""
    changes = [
        change
        for sample in samples
        if sample.ok and sample.first is not None
        for change in ((sample.first, 1), (sample.ended, -1))
    ]
    most = now = 0
    for _, change in sorted(changes):  # at equal times an end comes first
        now += change
        most = max(most, now)
    return most


def failures(samples: Iterable[Sample]) -> dict[str, int]:
    """How many requests failed, by kind."""
    return dict(Counter(sample.error for sample in samples if sample.error is not None))


def failure_reasons(samples: Iterable[Sample]) -> dict[str, dict[str, int]]:
    """How many requests of all phases and sides failed, by kind and message, the most frequent first."""
    found: dict[str, dict[str, int]] = {}
    counted = Counter((sample.target, sample.error, sample.message) for sample in samples if sample.error is not None)
    for (side, kind, message), count in counted.most_common():
        found.setdefault(kind if side == "target" else f"{kind} ({side})", {})[message] = count
    return found


def phase_figures(samples: Sequence[Sample], *, ttft_limit: float, itl_limit: float) -> Figures:
    """All figures of one phase's (or level's) requests."""
    if not samples:
        return {}
    complete = [sample for sample in samples if sample.ok]
    times = [sample.generation_time for sample in complete]
    seconds = wall_time(samples)
    good = sum(is_good(sample, ttft_limit, itl_limit) for sample in samples)
    count = len(samples)
    figures: Figures = {
        "requests": Figure(count, count),
        "success_rate": Figure(len(complete) / count, count),
        "error_rate": Figure(1 - len(complete) / count, count),
        "goodput_share": Figure(good / count, count),
        "streams_at_once": Figure(most_at_once(samples), count),
    }
    if seconds > 0:
        tokens = sum(sample.tokens for sample in complete)
        figures["goodput"] = Figure(good / seconds, count)
        figures["requests_per_second"] = Figure(len(complete) / seconds, count)
        figures["total_tokens_per_second"] = Figure(tokens / seconds, count)
    if times:
        values = {"avg": statistics.fmean(times), "median": statistics.median(times), "min": min(times)}
        values |= {"max": max(times), "p95": np.percentile(times, 95), "p99": np.percentile(times, 99)}
        figures |= {f"{name}_generation_time": Figure(float(value), len(times)) for name, value in values.items()}
    figures |= _percentiles("ttft", (sample.ttft for sample in complete))
    figures |= _percentiles("itl", (gap for sample in complete for gap in sample.gaps))
    figures |= _percentiles("tpot", (sample.tpot for sample in complete))
    # Tokens a second after the first one, which waits for the prompt.
    paces = [(sample.tokens - 1, sample.tpot) for sample in complete if sample.tpot is not None]
    if seconds := sum(tokens * tpot for tokens, tpot in paces):
        figures["tokens_per_second"] = Figure(sum(tokens for tokens, _ in paces) / seconds, len(paces))
    return figures


def headline(samples: Sequence[Sample], *, ttft_limit: float, itl_limit: float) -> Figures:
    """The figures of the rows that thresholds name, each from the phase it is defined on.

    `tokens_per_second` is that of one stream alone, `total_tokens_per_second` and `error_rate` are those of the
    concurrent phase, `concurrent_handling` is the most streams open at once where no request failed.
    """

    def of(*phases: Phase) -> Figures:
        rows = [sample for sample in samples if sample.phase in phases]
        return phase_figures(rows, ttft_limit=ttft_limit, itl_limit=itl_limit)

    def some(figures: Figures, *names: str) -> Figures:
        return {name: figures[name] for name in names if name in figures}

    counted = of(*COUNTED)
    figures: Figures = {name: figures for name, figures in counted.items() if name.endswith("_generation_time")}
    figures |= some(counted, "success_rate", "requests")
    figures |= some(of("single"), "tokens_per_second")
    figures |= some(of("concurrent"), "total_tokens_per_second", "error_rate")
    if (phase := latency_phase(samples)) is not None:
        names = [f"{what}_p{percent}" for what in ("ttft", "itl", "tpot") for percent in (50, 95, 99)]
        figures |= some(of(phase), *names, "goodput", "goodput_share")
    loads = groups(samples, "concurrent", "stress")
    if loads:
        handled = [most_at_once(rows) for rows in loads.values() if all(row.ok for row in rows)]
        figures["concurrent_handling"] = Figure(max(handled, default=0), sum(map(len, loads.values())))
    cold = [row.ttft for row in samples if row.phase == "cold" and row.ok and row.ttft is not None]
    if cold:
        figures["cold_start_s"] = Figure(statistics.median(cold), len(cold))
    return figures


def latency_phase(samples: Iterable[Sample]) -> Phase | None:
    """The phase that the headline's latencies come from."""
    run = {sample.phase for sample in samples}
    return next((phase for phase in LATENCY_PHASES if phase in run), None)


def groups(samples: Iterable[Sample], *phases: Phase) -> dict[tuple[Phase, int], list[Sample]]:
    """Rows by phase and number of open requests, in the order in which they were run."""
    found: dict[tuple[Phase, int], list[Sample]] = {}
    for sample in samples:
        if sample.phase in phases:
            found.setdefault((sample.phase, sample.level), []).append(sample)
    return found


def _percentiles(name: str, observed: Iterable[float | None]) -> Figures:
    values = [value for value in observed if value is not None]
    if not values:
        return {}
    return {
        f"{name}_p{percent}": Figure(float(np.percentile(values, percent)), len(values)) for percent in (50, 95, 99)
    }
