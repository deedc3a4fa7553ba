"""Prometheus metrics of the service.

Each service has a registry of its own, so that several can live in one process and no library's metrics mix in. Label
values come from short lists made here. What the engine knows (slots, queue) is read at scrape time, so it costs nothing
in between. The stems are those of the benchmark.
"""

import logging
import os
import time
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from model.generation import Chunk
from model.serving.backend import Backend
from model.serving.session import Generation

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_TOKENS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
QUEUED = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WHOLE_STORY = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120)
REFUSALS = ("refused", "limited", "draining")
OUTCOMES = ("stop", "length", "cancelled", "error", *REFUSALS)
ROUTES = (
    *("/v1/completions", "/v1/chat/completions", "/v1/models"),
    *("/api/generate", "/api/health", "/health", "/ping", "/metrics", "/openapi.json"),
)

MOST_NAMES = 8
"""Distinct values of a label whose values may come from another machine; further ones count as `other`."""

STATM = Path("/proc/self/statm")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

log = logging.getLogger("story.stream")


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


class Meter(Collector):
    """All metrics of one service, an `Observer` of its sessions; `deployment`: its name, if it has one."""

    def __init__(self, backend: Backend, deployment: str = "") -> None:
        self._backend, self._deployment = backend, deployment
        self._names: set[str] = set()
        self._versions: set[str] = set()
        self.failed_at: dict[str, float] = {}
        """When a stream last ended with an error or was not started (seconds since 1970), by its outcome."""
        self.registry = registry = CollectorRegistry(auto_describe=False)
        self.streams = Counter(
            "story_streams",
            "Streams by outcome: stop, length, cancelled (by the client or because it disconnected), error, refused "
            "(queue full, or unknown token ids), limited (rate limit), draining.",
            ["outcome", "served_by", "version", "deployment"],
            registry=registry,
        )
        for outcome in OUTCOMES:
            self._count(outcome, backend.health().served_by, 0)
        self.open = Gauge("story_streams_open", "Open streams.", registry=registry)
        tokens = Counter("story_tokens", "Prompt and completion tokens.", ["kind"], registry=registry)
        self._prompt_tokens, self.tokens = tokens.labels("prompt"), tokens.labels("completion")
        histogram = partial(Histogram, registry=registry)
        self.ttft = histogram("story_ttft_seconds", "From request to first token.", buckets=FIRST_TOKEN)
        self.itl = histogram("story_itl_seconds", "Between two tokens of a stream.", buckets=BETWEEN_TOKENS)
        self._queued = histogram("story_queue_wait_seconds", "From request to a slot.", buckets=QUEUED)
        what = "From request to the end of the stream."
        self.duration = histogram("story_generation_time_seconds", what, buckets=WHOLE_STORY)
        self._requests = Counter("story_http_requests", "HTTP requests.", ["route", "status"], registry=registry)
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Yield the backend's state at scrape time."""
        health, model = self._backend.health(), self._backend.model
        yield GaugeMetricFamily("story_ready", "1 if a request could be served now.", float(health.ready))
        what = "Streams that can be open at once, queued ones included."
        yield GaugeMetricFamily("story_capacity", what, self._backend.capacity)
        if (engine := health.engine) is not None:
            yield GaugeMetricFamily("story_slots", "Decode slots of the engine.", engine.slots)
            yield GaugeMetricFamily("story_slots_active", "Decode slots in use.", engine.active)
            yield GaugeMetricFamily("story_waiting", "Requests in the queue for a slot.", engine.waiting)
            what = "Prompt tokens that the engine read (computed) or knew from an earlier prompt (cached)."
            prefill = CounterMetricFamily("story_prefill_tokens", what, labels=["source"])
            prefill.add_metric(["computed"], engine.prompt_tokens)
            prefill.add_metric(["cached"], engine.cached_prompt_tokens)
            yield prefill
        if health.breaker is not None:
            what = "1 for the state of the circuit breaker before Modal."
            breaker = GaugeMetricFamily("story_breaker", what, labels=["state"])
            for state in ("closed", "open", "half-open"):
                breaker.add_metric([state], float(state == health.breaker))
            yield breaker
        labels = ["deployment", "version", "served_by"]
        info = GaugeMetricFamily("story_info", "Deployment, model version and backend.", labels=labels)
        info.add_metric([self._deployment, model.version[:12], health.served_by], 1)
        yield info
        labels = ["alias", "version", "digest"]
        served = GaugeMetricFamily("story_model_info", "Registered version that serves, if it is one.", labels=labels)
        served.add_metric([model.alias, "" if model.number is None else str(model.number), model.version], 1)
        yield served
        what = "Versions that the alias named and that could not be served."
        yield CounterMetricFamily("story_model_refused", what, health.models_refused)
        used, limit = resident(), memory_limit()
        if used is not None and limit is not None:
            yield GaugeMetricFamily("story_memory_bytes", "Resident memory of this process.", used)
            yield GaugeMetricFamily("story_memory_limit_bytes", "Memory limit of this process.", limit)
            yield GaugeMetricFamily("story_memory_percent", "Memory used, in percent of the limit.", 100 * used / limit)

    def submitted(self, generation: Generation) -> None:
        """Count an open stream."""
        self.open.inc()

    def received(self, generation: Generation, chunk: Chunk) -> None:
        """Count the tokens of a chunk; those that came together count as evenly spaced."""
        count, timer = len(chunk.tokens), generation.timer
        if not count:
            return
        self.tokens.inc(count)
        if timer.tokens == count:
            self.ttft.observe(timer.first_at - timer.started)
            return
        for _ in range(count):
            self.itl.observe(timer.gap)

    def ended(self, generation: Generation) -> None:
        """Count and log a stream that has ended; one that was not started is only counted."""
        outcome, timer, stream = generation.outcome, generation.timer, generation.stream
        assert outcome is not None, "it has ended"
        served_by = self._backend.health().served_by if stream is None else stream.served_by
        self._count(outcome, served_by)
        if generation.submitted:
            self.open.dec()
        if outcome == "error" or outcome in REFUSALS:
            self.failed_at[outcome] = time.time()
        if outcome in REFUSALS:
            return
        if generation.completion is not None:
            self._prompt_tokens.inc(generation.completion.usage.prompt_tokens)
            self._queued.observe(generation.completion.usage.queued)
        took = time.perf_counter() - timer.started
        self.duration.observe(took)
        log.info(
            "stream ended",
            extra={
                "request_id": generation.request_id,
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
        self.streams.labels(outcome, _bounded(self._names, served_by), version, self._deployment).inc(streams)


def _bounded(known: set[str], name: str) -> str:
    """Return `name`, or `other` once there are many: names may come from another machine."""
    if len(known) < MOST_NAMES:
        known.add(name)
    return name if name in known else "other"
