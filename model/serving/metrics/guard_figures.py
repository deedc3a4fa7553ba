"""What the guard counts, for Prometheus: refusals, what memory was asked for, and whether Redis is there.

Everything is counted where it happens and only read here, so it costs nothing in between. The page's stories count
too: one guard stands before both.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from model.serving.cache.stores import ASKED, Stories
from model.serving.guard import Guard
from model.serving.rate_limit.limiter import Limiter
from model.serving.redis import RedisLink


class GuardFigures(Collector):
    """The guard's state at the moment of reading."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def describe(self) -> Iterable[Metric]:
        return ()  # all are known by name when they are read

    def collect(self) -> Iterable[Metric]:
        guard = self._guard
        yield from _limits(guard.limiter)
        if guard.stories is not None:
            yield from _stories(guard.stories)
        if guard.link is not None:
            yield from _redis(guard.link)


def _limits(limiter: Limiter) -> Iterable[Metric]:
    refused = CounterMetricFamily(
        "story_limit_refusals",
        "Requests that met a limit, by whose it was and of what.",
        labels=["scope", "resource"],
    )
    for scope, resource in sorted({(quota.scope, quota.resource) for quota in limiter.quotas}):
        refused.add_metric([scope, resource], limiter.refusals[scope, resource])
    yield refused
    yield GaugeMetricFamily("story_limit_windows", "Windows that are counted in memory.", limiter.windows)


def _stories(stories: Stories) -> Iterable[Metric]:
    asked = CounterMetricFamily(
        "story_cache_requests",
        "Stories asked for: hit (told from memory), joined (followed while it was written for another), "
        "miss (written), bypassed (not to be told from memory, as with a seed drawn by chance).",
        labels=["outcome"],
    )
    for outcome in ASKED:
        asked.add_metric([outcome], stories.asked[outcome])
    yield asked
    memory = stories.memory
    yield GaugeMetricFamily("story_cache_bytes", "Memory that told stories take.", memory.bytes)
    yield GaugeMetricFamily("story_cache_stories", "Told stories in memory.", len(memory))
    yield CounterMetricFamily(
        "story_cache_evictions", "Told stories that had to go before their time.", memory.evictions
    )


def _redis(link: RedisLink) -> Iterable[Metric]:
    yield GaugeMetricFamily(
        "story_redis_up", "1 while Redis answers; else limits and memory are this process's own.", link.up
    )
    yield CounterMetricFamily("story_redis_losses", "How often Redis was lost.", link.losses)
