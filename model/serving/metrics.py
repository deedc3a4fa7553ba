"""Prometheus metrics of the service.

Each service has a registry of its own, so that several can live in one process and no library's metrics mix in. Label
values come from short lists made here. What the engine knows (slots, queue) is read at scrape time, so it costs nothing
in between. The stems are those of the benchmark.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Iterable
from functools import cache
from pathlib import Path
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from model.errors import BusyError
from model.generation import Chunk, Completion, GenerationRequest
from model.serving.backend import Backend, BackendWrapper, Stream, StreamTimer
from model.serving.logs import new_request_id, request_id

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_TOKENS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
QUEUED = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WHOLE_STORY = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120)
OUTCOMES = ("stop", "length", "cancelled", "error", "refused", "limited", "draining")
ROUTES = (
    *("/v1/completions", "/v1/chat/completions", "/v1/models"),
    *("/api/generate", "/api/health", "/health", "/ping", "/metrics", "/openapi.json"),
)

MOST_NAMES = 8
"""Distinct values of a label whose values may come from another machine; further ones count as `other`."""

STATM = Path("/proc/self/statm")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

log = logging.getLogger("story.stream")

Refusal = Literal["refused", "limited", "draining"]


def resident() -> int | None:
    """Return this process's resident memory in bytes, where Linux reports it."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


@cache
def memory_limit() -> int | None:
    """Return the container's memory limit in bytes, or the machine's memory where there is none."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
    for path in CGROUP_LIMITS:
        try:
            return min(machine, int(path.read_text()))
        except (OSError, ValueError):  # no such file, or `max`
            continue
    return machine


class _BackendCollector(Collector):
    """The backend's state at scrape time."""

    def __init__(self, backend: Backend, deployment: str) -> None:
        self._backend, self._deployment = backend, deployment

    def collect(self) -> Iterable[Metric]:
        health = self._backend.health()
        yield GaugeMetricFamily("story_ready", "1 if a request could be served now.", float(health.ready))
        yield GaugeMetricFamily(
            "story_capacity", "Streams that can be open at once, queued ones included.", self._backend.capacity
        )
        if (engine := health.engine) is not None:
            yield GaugeMetricFamily("story_slots", "Decode slots of the engine.", engine.slots)
            yield GaugeMetricFamily("story_slots_active", "Decode slots in use.", engine.active)
            yield GaugeMetricFamily("story_waiting", "Requests in the queue for a slot.", engine.waiting)
        if health.breaker is not None:
            breaker = GaugeMetricFamily(
                "story_breaker", "1 for the state of the circuit breaker before Modal.", labels=["state"]
            )
            for state in ("closed", "open", "half-open"):
                breaker.add_metric([state], float(state == health.breaker))
            yield breaker
        info = GaugeMetricFamily(
            "story_info", "Deployment, model version and backend.", labels=["deployment", "version", "served_by"]
        )
        info.add_metric([self._deployment, self._backend.model.version[:12], health.served_by], 1)
        yield info
        used, limit = resident(), memory_limit()
        if used is not None and limit is not None:
            yield GaugeMetricFamily("story_memory_bytes", "Resident memory of this process.", used)
            yield GaugeMetricFamily("story_memory_limit_bytes", "Memory limit of this process.", limit)
            yield GaugeMetricFamily("story_memory_percent", "Memory used, in percent of the limit.", 100 * used / limit)


class Meter:
    """All metrics of one service; `deployment` is the name of this deployment, if it has one."""

    def __init__(self, backend: Backend, deployment: str = "") -> None:
        self._backend, self._deployment = backend, deployment
        self._names: set[str] = set()
        self._versions: set[str] = set()
        self.registry = registry = CollectorRegistry(auto_describe=False)
        self._streams = Counter(
            "story_streams",
            "Streams by outcome: stop, length, cancelled (by the client or because it disconnected), error, refused "
            "(queue full), limited (rate limit), draining.",
            ["outcome", "served_by", "version", "deployment"],
            registry=registry,
        )
        for outcome in OUTCOMES:
            self._count(outcome, backend.health().served_by, 0)
        self.open = Gauge("story_streams_open", "Open streams.", registry=registry)
        tokens = Counter("story_tokens", "Prompt and completion tokens.", ["kind"], registry=registry)
        self._prompt_tokens, self.tokens = tokens.labels("prompt"), tokens.labels("completion")
        self.ttft = Histogram(
            "story_ttft_seconds", "From request to first token.", buckets=FIRST_TOKEN, registry=registry
        )
        self.itl = Histogram(
            "story_itl_seconds", "Between two tokens of a stream.", buckets=BETWEEN_TOKENS, registry=registry
        )
        self._queued = Histogram(
            "story_queue_wait_seconds", "From request to a slot.", buckets=QUEUED, registry=registry
        )
        self._duration = Histogram(
            "story_generation_time_seconds",
            "From request to the end of the stream.",
            buckets=WHOLE_STORY,
            registry=registry,
        )
        self._requests = Counter("story_http_requests", "HTTP requests.", ["route", "status"], registry=registry)
        registry.register(_BackendCollector(backend, deployment))

    def refused(self, why: Refusal, requests: int) -> None:
        """Count requests that were not started."""
        self._count(why, self._backend.health().served_by, requests)

    def ended(
        self, timer: StreamTimer, name: str, served_by: str, ending: Completion | Literal["error", "cancelled"]
    ) -> None:
        """Count and log a stream that has ended; `name` is its request's id."""
        outcome = ending if isinstance(ending, str) else ending.finish_reason
        if isinstance(ending, Completion):
            self._prompt_tokens.inc(ending.usage.prompt_tokens)
            self._queued.observe(ending.usage.queued)
        took = time.perf_counter() - timer.started
        self._count(outcome, served_by)
        self._duration.observe(took)
        log.info(
            "stream ended",
            extra={
                "request_id": name,
                "outcome": outcome,
                "served_by": served_by,
                "tokens": timer.tokens,
                "ttft": round(timer.first_at - timer.started, 4) if timer.first_at else None,
                "seconds": round(took, 4),
            },
        )

    def answered(self, path: str, status: int) -> str:
        """Count an HTTP request; returns its route, of a short list."""
        if path.startswith("/socket.io"):
            route = "/socket.io"
        elif path.startswith("/v1/models/"):
            route = "/v1/models/{id}"
        else:
            route = path if path in ROUTES else "other"
        self._requests.labels(route, str(status)).inc()
        return route

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _count(self, outcome: str, served_by: str, streams: float = 1) -> None:
        version = _bounded(self._versions, self._backend.model.version[:12])
        self._streams.labels(outcome, _bounded(self._names, served_by), version, self._deployment).inc(streams)


class MeteredStream:
    """A stream whose chunks are counted as they are read. It is counted once, however it ends."""

    def __init__(self, stream: Stream, meter: Meter, started: float) -> None:
        self._stream, self._meter = stream, meter
        self._timer = StreamTimer(started)
        self._request = request_id.get() or new_request_id()
        self._read = False
        self._open = True
        meter.open.inc()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        self._read = True
        try:
            async for chunk in self._stream:
                self._count(chunk)
                yield chunk
            self._end(self._stream.completion)
        except Exception:
            self._end("error")
            raise
        finally:
            self._end("cancelled")

    def cancel(self) -> object:
        if not self._read:  # nobody will iterate it to its end
            self._end("cancelled")
        return self._stream.cancel()

    @property
    def completion(self) -> Completion:
        return self._stream.completion

    @property
    def served_by(self) -> str:
        return self._stream.served_by

    def _count(self, chunk: Chunk) -> None:
        """Count the tokens of a chunk; those that came together count as evenly spaced."""
        count = len(chunk.tokens)
        if not count:
            return
        timer, meter, before = self._timer, self._meter, self._timer.last_at
        timer.add(chunk)
        meter.tokens.inc(count)
        if not before:
            meter.ttft.observe(timer.first_at - timer.started)
            return
        gap = (timer.last_at - before) / count
        for _ in range(count):
            meter.itl.observe(gap)

    def _end(self, ending: Completion | Literal["error", "cancelled"]) -> None:
        if self._open:
            self._open = False
            self._meter.open.dec()
            self._meter.ended(self._timer, self._request, self._stream.served_by, ending)


class MeteredBackend(BackendWrapper[Backend]):
    """Counts every stream of `backend`. Outermost wrapper, so latencies include cache lookups."""

    def __init__(self, backend: Backend, meter: Meter) -> None:
        super().__init__(backend)
        self._meter = meter

    async def submit(self, request: GenerationRequest) -> Stream:
        """See `Backend.submit`; refusals and failures are counted too."""
        started = time.perf_counter()
        try:
            stream = await self.backend.submit(request)
        except BusyError:
            self._meter.refused("refused", 1)
            raise
        except Exception:
            name = request_id.get() or new_request_id()
            self._meter.ended(StreamTimer(started), name, self.backend.name, "error")
            raise
        return MeteredStream(stream, self._meter, started)


def _bounded(known: set[str], name: str) -> str:
    """Return `name`, or `other` once there are many: names may come from another machine."""
    if len(known) < MOST_NAMES:
        known.add(name)
    return name if name in known else "other"
