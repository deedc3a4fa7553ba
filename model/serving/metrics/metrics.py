"""What the service measures of itself, for Prometheus.

Each service has a registry of its own, so that several can live in one process and nothing that a library
counts gets mixed in. Labels take only values from short lists made here. What the engine knows (slots, the
line) is asked for when it is read, so it costs nothing in between. The stems are those of the benchmark.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from model.generation import Completion
from model.serving.backend import Backend
from model.serving.logs import new_request_id, request_id
from model.serving.metrics.memory import memory_limit, resident

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_TOKENS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
QUEUED = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WHOLE_STORY = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120)
ROUTES = (
    "/v1/completions",
    "/v1/models",
    "/api/generate",
    "/api/health",
    "/metrics",
)

MOST_NAMES = 8
"""Different values that a label of names from outside may take; all others count as `other`."""

log = logging.getLogger("story.told")

Refusal = Literal["refused", "limited", "draining"]


class _EngineGauges(Collector):
    """The backend's state at the moment of reading."""

    def __init__(self, backend: Backend, deployment: str) -> None:
        self._backend, self._deployment = backend, deployment

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering asks no engine

    def collect(self) -> Iterable[Metric]:
        health = self._backend.health()
        yield GaugeMetricFamily("story_ready", "1 if a story could be written now.", float(health.ready))
        yield GaugeMetricFamily(
            "story_capacity",
            "Stories that can be open at once, waiting ones included.",
            self._backend.capacity,
        )
        if (engine := health.engine) is not None:
            yield GaugeMetricFamily("story_slots", "Stories that the engine writes at once.", engine.slots)
            yield GaugeMetricFamily("story_slots_active", "Slots that are taken.", engine.active)
            yield GaugeMetricFamily("story_waiting", "Stories that wait for a slot.", engine.waiting)
        if health.breaker is not None:
            breaker = GaugeMetricFamily(
                "story_breaker", "1 for the state of the breaker before Modal.", labels=["state"]
            )
            for state in ("closed", "open", "half-open"):
                breaker.add_metric([state], float(state == health.breaker))
            yield breaker
        info = GaugeMetricFamily(
            "story_info", "What writes here, in its labels.", labels=["deployment", "version", "served_by"]
        )
        info.add_metric([self._deployment, self._backend.model.version[:12], health.served_by], 1)
        yield info
        used, room = resident(), memory_limit()
        if used is not None and room is not None:
            yield GaugeMetricFamily("story_memory_bytes", "Resident memory of this process.", used)
            yield GaugeMetricFamily("story_memory_limit_bytes", "Memory that it may have.", room)
            yield GaugeMetricFamily("story_memory_percent", "The first of the second.", 100 * used / room)


class Meter:
    """All figures of one service; `deployment` is the name of this copy, if it has one."""

    def __init__(self, backend: Backend, deployment: str = "") -> None:
        self._backend, self._deployment = backend, deployment
        self._writers: set[str] = set()
        self._versions: set[str] = set()
        self.registry = registry = CollectorRegistry(auto_describe=False)
        self._streams = Counter(
            "story_streams",
            "Stories, by how they ended: stop, length, cancelled (by the reader or because one went away), "
            "error, refused (the line was full), limited (a limit was reached), draining.",
            ["outcome", "served_by", "version", "deployment"],
            registry=registry,
        )
        for outcome in ("stop", "length", "cancelled", "error", "refused", "limited", "draining"):
            self._count(outcome, backend.health().served_by, 0)
        self._open = Gauge("story_streams_open", "Stories this service is telling.", registry=registry)
        tokens = Counter("story_tokens", "Tokens read and written.", ["kind"], registry=registry)
        self._prompt_tokens, self._tokens = tokens.labels("prompt"), tokens.labels("completion")
        self._ttft = Histogram(
            "story_ttft_seconds", "From request to first token.", buckets=FIRST_TOKEN, registry=registry
        )
        self._itl = Histogram(
            "story_itl_seconds", "Between two tokens of a story.", buckets=BETWEEN_TOKENS, registry=registry
        )
        self._queued = Histogram(
            "story_queue_wait_seconds", "From request to a slot.", buckets=QUEUED, registry=registry
        )
        self._duration = Histogram(
            "story_generation_time_seconds",
            "From request to the story's end.",
            buckets=WHOLE_STORY,
            registry=registry,
        )
        self._requests = Counter(
            "story_http_requests", "Answered requests.", ["route", "status"], registry=registry
        )
        registry.register(_EngineGauges(backend, deployment))

    def begin(self, began: float) -> Timing:
        """A story has begun; `began` is when it was asked for, by `time.perf_counter`."""
        self._open.inc()
        return Timing(self, began)

    def refused(self, why: Refusal, stories: int) -> None:
        """Stories were not begun."""
        self._count(why, self._backend.health().served_by, stories)

    def _count(self, outcome: str, served_by: str, stories: float = 1) -> None:
        version = _bounded(self._versions, self._backend.model.version[:12])
        self._streams.labels(outcome, _bounded(self._writers, served_by), version, self._deployment).inc(
            stories
        )

    def answered(self, path: str, status: int) -> str:
        """A request was answered, by a route or not; returns which, of a short list."""
        if path.startswith("/socket.io"):
            route = "/socket.io"
        elif path.startswith("/v1/models/"):
            route = "/v1/models/{id}"
        else:
            route = path if path in ROUTES else "other"
        self._requests.labels(route, str(status)).inc()
        return route

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class Timing:
    """The times of one story. `abandoned` may always be called at the end; it counts what `end` did not."""

    __slots__ = ("_began", "_first", "_last", "_meter", "_name", "_open", "_tokens")

    def __init__(self, meter: Meter, began: float) -> None:
        self._meter = meter
        self._began = began
        self._name = request_id.get() or new_request_id()
        self._first = self._last = 0.0
        self._tokens = 0
        self._open = True

    def chunk(self, tokens: int) -> None:
        """A chunk of so many tokens came; what came together counts as having come evenly."""
        if not tokens:
            return
        now = time.perf_counter()
        meter = self._meter
        meter._tokens.inc(tokens)
        self._tokens += tokens
        if not self._last:
            self._first = now
            meter._ttft.observe(now - self._began)
        else:
            gap = (now - self._last) / tokens
            for _ in range(tokens):
                meter._itl.observe(gap)
        self._last = now

    def end(self, completion: Completion | None, served_by: str) -> None:
        """The story of `served_by` ended; None: it failed."""
        if completion is None:
            self._close("error", served_by)
            return
        self._meter._prompt_tokens.inc(completion.usage.prompt_tokens)
        self._meter._queued.observe(completion.usage.queued)
        self._close(completion.finish_reason, served_by)

    def abandoned(self, served_by: str) -> None:
        """Nobody reads the story any more."""
        self._close("cancelled", served_by)

    def _close(self, outcome: str, served_by: str) -> None:
        if not self._open:
            return
        self._open = False
        took = time.perf_counter() - self._began
        self._meter._open.dec()
        self._meter._count(outcome, served_by)
        self._meter._duration.observe(took)
        log.info(
            "a story was told",
            extra={
                "request_id": self._name,
                "outcome": outcome,
                "served_by": served_by,
                "tokens": self._tokens,
                "ttft": round(self._first - self._began, 4) if self._first else None,
                "seconds": round(took, 4),
            },
        )


def _bounded(known: set[str], name: str) -> str:
    """`name`, or `other` once there are many: names may come from another machine."""
    if len(known) < MOST_NAMES:
        known.add(name)
    return name if name in known else "other"
