"""How the service is doing now, for the page Status: a plain function from the service's own metrics to plain values.

Everybody who can open the page reads it, also through a share link. So it holds no address, no path, no message of an
error and no client; and while versions are compared, not which of them generates.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prometheus_client import Histogram

from experiments.common.thresholds import Threshold
from model.serving.http.health import version
from model.serving.metrics import WHOLE_STORY, Meter, memory_limit, resident
from model.serving.session import GenerationManager

WINDOW = 300.0
"""Seconds that the figures cover at least, once the service has run so long: those of the alerts."""
STEP = 10.0
"""Seconds between two snapshots at least."""
COMPLETED, FAILED = ("stop", "length"), ("error", "refused")
"""Outcomes that the success rate counts, as the alerts do: a client that left or reached its limit is no failure."""
LABELS = {
    "avg_generation_time": "Whole story, mean",
    "max_generation_time": "Whole story, longest",
    "success_rate": "Requests that completed",
    "concurrent_handling": "Stories at once",
    "error_rate": "Requests that failed",
    "memory_percent": "Memory, of its limit",
    "ttft_p50": "First token, median",
    "ttft_p95": "First token, 95th percentile",
    "itl_p50": "Between tokens, median",
    "itl_p95": "Between tokens, 95th percentile",
    "tokens_per_second": "One stream",
}
"""Figures in the order of the page; those of `thresholds.yaml` that a service can measure of itself are among them."""
UNITS = {name: "s" for name in LABELS if name.endswith(("_time", "_p50", "_p95"))} | {
    "success_rate": "share",
    "error_rate": "share",
    "concurrent_handling": "streams",
    "memory_percent": "percent",
    "tokens_per_second": "tokens/s",
}
FAILURES = {
    "error": "a story broke off",
    "refused": "the queue was full",
    "limited": "a rate limit was reached",
    "draining": "the service was stopping",
}
"""Outcomes of streams that brought no story, in words."""

Buckets = tuple[tuple[float, float], ...]
"""(upper bound, observations up to it) of a histogram, ascending; the last bound is infinite."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The counters of a service at one moment."""

    at: float
    """By `time.monotonic`."""
    ttft: Buckets
    itl: Buckets
    duration: Buckets
    seconds: float
    """Of all stories together."""
    itl_seconds: float
    """Between all tokens together."""
    outcomes: Mapping[str, float]


class StatusSource:
    """Answers for one service. Figures cover the last `WINDOW` seconds, or as far back as somebody asked before."""

    def __init__(
        self,
        manager: GenerationManager,
        meter: Meter,
        thresholds: Sequence[Threshold],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager, self._meter, self._clock = manager, meter, clock
        self._thresholds = {each.metric: each for each in thresholds if each.metric in LABELS}
        self._began = clock()
        self._past = deque([self._snapshot()])

    def status(self) -> dict[str, Any]:
        """Return who generates, the load, the latency against the documented thresholds, and what failed."""
        now = self._snapshot()
        past = self._baseline(now)
        health, model = self._manager.backend.health(), self._manager.backend.model
        draining = self._manager.draining
        engine = health.engine
        return {
            "state": "draining" if draining else "ready" if health.ready else "not ready",
            "model": {"name": model.name, "alias": model.alias, "digest": model.version[:12]},
            "runtime": engine.runtime if engine is not None else "",
            "served_by": health.served_by,
            "deployment": self._manager.options.name,
            "version": version(),
            "breaker": health.breaker or "",
            "slots": engine.slots if engine is not None else None,
            "active": engine.active if engine is not None else None,
            "waiting": engine.waiting if engine is not None else None,
            "capacity": self._manager.backend.capacity,
            "open": self._manager.open,
            "up_seconds": round(now.at - self._began),
            "window_seconds": round(now.at - past.at),
            "stories": round(sum(_since(now.outcomes, past.outcomes, COMPLETED))),
            "figures": [
                self._figure(name, value)
                for name, value in figures(past, now, slots=None if engine is None else engine.slots).items()
            ],
            "failures": self._failures(now),
        }

    def _figure(self, name: str, value: float | None) -> dict[str, Any]:
        """A figure with its threshold, where one is documented."""
        threshold = self._thresholds.get(name)
        return {
            "metric": name,
            "label": LABELS[name],
            "value": None if value is None or math.isinf(value) else value,
            "unit": UNITS[name],
            "text": in_words(name, value),
            "threshold": "" if threshold is None else bound_of(threshold),
            "holds": None if threshold is None or value is None else threshold.holds(value),
        }

    def _failures(self, now: Snapshot) -> list[dict[str, Any]]:
        """What brought no story since the service began, by kind, the last time first."""
        last = self._meter.failed_at
        kinds = sorted((kind for kind in FAILURES if kind in last), key=lambda kind: -last[kind])
        return [
            {
                "kind": kind,
                "what": FAILURES[kind],
                "count": round(now.outcomes.get(kind, 0.0)),
                "last": datetime.fromtimestamp(last[kind], UTC).isoformat(timespec="seconds"),
            }
            for kind in kinds
        ]

    def _snapshot(self) -> Snapshot:
        meter = self._meter
        outcomes: dict[str, float] = {}
        for sample in next(iter(meter.streams.collect())).samples:
            if sample.name.endswith("_total"):
                outcome = sample.labels["outcome"]
                outcomes[outcome] = outcomes.get(outcome, 0.0) + sample.value
        (ttft, _), (itl, between), (duration, seconds) = map(_read, (meter.ttft, meter.itl, meter.duration))
        return Snapshot(self._clock(), ttft, itl, duration, seconds, between, outcomes)

    def _baseline(self, now: Snapshot) -> Snapshot:
        """The newest snapshot that is at least `WINDOW` old, else the oldest; keep `now` for later."""
        while len(self._past) > 1 and now.at - self._past[1].at >= WINDOW:
            self._past.popleft()
        if now.at - self._past[-1].at >= STEP:
            self._past.append(now)
        return self._past[0]


def figures(past: Snapshot, now: Snapshot, *, slots: int | None) -> dict[str, float | None]:
    """Return the figures of `LABELS` between two snapshots; None where nothing was observed.

    `max_generation_time` is the bound of the bucket that holds the longest story, infinite beyond the last one.
    """
    ttft, itl, duration = (
        tuple((bound, count - before) for (bound, count), (_, before) in zip(after, earlier, strict=True))
        for after, earlier in ((now.ttft, past.ttft), (now.itl, past.itl), (now.duration, past.duration))
    )
    stories, gaps = duration[-1][1], itl[-1][1]
    completed, failed = (sum(_since(now.outcomes, past.outcomes, names)) for names in (COMPLETED, FAILED))
    asked, between = completed + failed, now.itl_seconds - past.itl_seconds
    used, limit = resident(), memory_limit()
    return {
        "avg_generation_time": (now.seconds - past.seconds) / stories if stories else None,
        "max_generation_time": next((bound for bound, count in duration if count >= stories), None)
        if stories
        else None,
        "success_rate": completed / asked if asked else None,
        "concurrent_handling": slots,
        "error_rate": failed / asked if asked else None,
        "memory_percent": None if used is None or limit is None else 100 * used / limit,
        "ttft_p50": quantile(ttft, 0.5),
        "ttft_p95": quantile(ttft, 0.95),
        "itl_p50": quantile(itl, 0.5),
        "itl_p95": quantile(itl, 0.95),
        "tokens_per_second": gaps / between if gaps and between > 0 else None,
    }


def in_words(name: str, value: float | None) -> str:
    """Return a figure as the page shows it: `12.3 ms`, `97.5 %`, `9,284 tokens/s`."""
    if value is None:
        return ""
    match UNITS[name]:
        case "s" if name == "max_generation_time":
            return f"more than {WHOLE_STORY[-1]:g} s" if math.isinf(value) else f"at most {value:g} s"
        case "s":
            return f"{value:.2f} s" if value >= 0.9995 else f"{1e3 * value:.3g} ms"
        case "share":
            return f"{100 * value:.1f} %"
        case "percent":
            return f"{value:.0f} %"
        case "streams":
            return f"{value:,.0f}"
        case unit:
            return f"{value:,.0f} {unit}"


def bound_of(threshold: Threshold) -> str:
    """Return a threshold in the unit of `in_words`: `≥ 80 %`, `≤ 10 s`."""
    if threshold.unit in ("share", "percent"):
        percent = threshold.limit * (100 if threshold.unit == "share" else 1)
        return f"{str(threshold)[0]} {percent:g} %"
    return str(threshold)


def quantile(buckets: Buckets, share: float) -> float | None:
    """Return the quantile `share` (0 to 1) of a histogram, as Prometheus' `histogram_quantile` does.

    Linear within a bucket; the highest finite bound beyond it; None without observations.
    """
    total = buckets[-1][1]
    if not total:
        return None
    rank, low, below = share * total, 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and count > below:
            inside = low + (bound - low) * (rank - below) / (count - below)
            return low if math.isinf(bound) else min(inside, bound)  # rounding may lift it above
        low, below = low if math.isinf(bound) else bound, count
    return low


def _read(histogram: Histogram) -> tuple[Buckets, float]:
    """The buckets of a histogram, and the sum of its observations."""
    samples = next(iter(histogram.collect())).samples
    buckets = tuple((float(each.labels["le"]), each.value) for each in samples if each.name.endswith("_bucket"))
    return buckets, sum(each.value for each in samples if each.name.endswith("_sum"))


def _since(now: Mapping[str, float], past: Mapping[str, float], names: Sequence[str]) -> list[float]:
    return [now.get(name, 0.0) - past.get(name, 0.0) for name in names]
