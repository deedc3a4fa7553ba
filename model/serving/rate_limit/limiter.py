"""Admit requests within the rate limits, or say when to retry.

A request reserves `max_tokens` against the limits; unused tokens are refunded when it ends. So many short stories at
once cannot slip through that would be too much if they were long. The windows in memory are asked first: the shared
ones in Redis can only be fuller, so a refusal here costs no round trip. While Redis is down, the windows in memory hold
what this process has admitted, and go on alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from limits import RateLimitItem
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from model.errors import InputError, LimitError
from model.generation import GenerationRequest
from model.serving.rate_limit.clients import Clients
from model.serving.rate_limit.windows import MemoryWindows, RedisWindows, Taken
from model.serving.redis import RedisLink, RedisUnavailableError
from model.settings import OFF, parse_limits

if TYPE_CHECKING:
    from model.settings import Settings

Scope = Literal["client", "all"]
Resource = Literal["stories", "tokens"]

SETTINGS: tuple[tuple[str, Scope, Resource, str], ...] = (
    ("STORY_LIMIT_STORIES", "client", "stories", "30/minute"),
    ("STORY_LIMIT_TOKENS", "client", "tokens", "20000/minute"),
    ("STORY_LIMIT_ALL_STORIES", "all", "stories", "600/minute"),
    ("STORY_LIMIT_ALL_TOKENS", "all", "tokens", "200000/minute"),
)
"""Names of the settings, and the limits in production where they are unset."""

MAX_UNITS = 20_000
"""A window counts its tokens in at most so many units: one entry of 20 bytes in Redis each, however large the amount.

Each request is rounded up, so with few units many short stories would be charged far too much: with a thousand, no more
than a thousand stories would fit into any window."""


@dataclass(frozen=True, slots=True)
class Quota:
    """One amount in one period."""

    scope: Scope
    resource: Resource
    item: RateLimitItem
    """Amount (in units) and period, as the `limits` library has them."""
    unit: int
    """Stories or tokens that count as one. Above 1 only where more than `MAX_UNITS` tokens are allowed."""

    @classmethod
    def of(cls, item: RateLimitItem, scope: Scope, resource: Resource) -> Quota:
        """Make the quota of a limit as it was read."""
        unit = max(1, math.ceil(item.amount / MAX_UNITS)) if resource == "tokens" else 1
        item = type(item)(item.amount // unit, item.multiples, namespace="story")
        return cls(scope, resource, item, unit)

    @property
    def amount(self) -> int:
        """Units allowed in a period."""
        return self.item.amount

    @property
    def allowed(self) -> int:
        """Stories or tokens allowed in a period."""
        return self.item.amount * self.unit

    @property
    def seconds(self) -> int:
        """The period."""
        return self.item.get_expiry()

    def key(self, client: str) -> str:
        """Return the name of the window that counts for `client`."""
        who = (client,) if self.scope == "client" else ()
        return self.item.key_for(self.scope, self.resource, *who)

    def cost(self, stories: int, tokens: int) -> int:
        """Return the cost of so many stories, of so many tokens together, in units."""
        return math.ceil((stories if self.resource == "stories" else tokens) / self.unit)

    def __str__(self) -> str:
        many = self.item.multiples
        name = self.item.GRANULARITY.name
        return f"{self.allowed} {self.resource} per {f'{many} {name}s' if many > 1 else name}"


def quotas_of(text: str, scope: Scope, resource: Resource) -> list[Quota]:
    """Return the quotas of a setting: see `model.settings.parse_limits`."""
    return [Quota.of(item, scope, resource) for item in parse_limits(text)]


class Reservation:
    """Tokens and stories reserved for one request; `release` refunds what was not committed."""

    def __init__(self, shared: RedisWindows | None = None) -> None:
        self._shared = shared
        self._in_memory: list[tuple[Quota, Taken]] = []
        self._in_redis: list[tuple[Quota, str, int]] = []
        self._stories = 0
        self._tokens = 0
        self._open = True

    def commit(self, *, stories: int = 0, tokens: int = 0) -> None:
        """Count stories that were started and tokens that were generated against the reservation."""
        self._stories += stories
        self._tokens += tokens

    def release(self) -> None:
        """Refund what was reserved and not committed; only the first call counts."""
        if not self._open:
            return
        self._open = False
        for quota, taken in self._in_memory:
            MemoryWindows.refund(taken, self._unused(quota, taken.cost))
        if self._shared is not None:
            for quota, key, cost in self._in_redis:
                self._shared.refund(key, self._unused(quota, cost))

    def _unused(self, quota: Quota, cost: int) -> int:
        return max(0, cost - quota.cost(self._stories, self._tokens))


class Limiter(Collector):
    """Rate limiter. Without quotas it admits everything at no cost. Used from one event loop."""

    def __init__(
        self,
        quotas: Sequence[Quota] = (),
        *,
        clients: Clients | None = None,
        redis: RedisLink | None = None,
        windows: MemoryWindows | None = None,
    ) -> None:
        # Those of a client come first: a client that asks too much must not use up what all share.
        self.quotas = sorted(quotas, key=lambda quota: quota.scope == "all")
        self.clients = clients or Clients()
        self._windows = windows or MemoryWindows()
        self._shared = RedisWindows(redis) if redis is not None and quotas else None
        self.refusals: Counter[tuple[Scope, Resource]] = Counter()
        """Refused requests, by the quota that they met."""

    @classmethod
    def from_settings(cls, settings: Settings, redis: RedisLink | None = None) -> Limiter:
        """Make the limiter that the settings ask for; unset limits hold in production only."""
        quotas: list[Quota] = []
        for name, scope, resource, default in SETTINGS:
            text = getattr(settings, name.lower()) or (default if settings.stage == "PROD" else OFF)
            quotas += quotas_of(text, scope, resource)
        return cls(quotas, clients=Clients(settings.story_trusted_proxies or ()), redis=redis)

    async def admit(self, client: str, requests: Sequence[GenerationRequest]) -> Reservation:
        """Reserve what these stories of one request may come to.

        Raises `LimitError`, with the time to wait, when that is too much now, and `InputError` when it always is.
        """
        reservation = Reservation(self._shared)
        stories, tokens = len(requests), sum(request.max_tokens for request in requests)
        try:
            for quota in self.quotas:
                self._reserve(reservation, quota, client, quota.cost(stories, tokens))
            if self._shared is not None:
                await self._reserve_shared(self._shared, reservation, client, stories, tokens)
        except BaseException:
            reservation.release()
            raise
        return reservation

    def collect(self) -> Iterable[Metric]:
        """Yield the limiter's metrics."""
        refused = CounterMetricFamily(
            "story_limit_refusals",
            "Requests refused by a rate limit, by the limit's scope and resource.",
            labels=["scope", "resource"],
        )
        for scope, resource in sorted({(quota.scope, quota.resource) for quota in self.quotas}):
            refused.add_metric([scope, resource], self.refusals[scope, resource])
        yield refused
        yield GaugeMetricFamily("story_limit_windows", "Rate-limit windows in memory.", len(self._windows))

    def _reserve(self, reservation: Reservation, quota: Quota, client: str, cost: int) -> None:
        if cost > quota.amount:
            field = "n" if quota.resource == "stories" else "max_tokens"
            raise InputError(field, f"asks for more than the limit here allows at all: {quota}")
        taken = self._windows.take(quota.key(client), quota.amount, quota.seconds, cost)
        if isinstance(taken, float):
            self._refuse(quota, taken)
        else:
            reservation._in_memory.append((quota, taken))

    async def _reserve_shared(
        self, shared: RedisWindows, reservation: Reservation, client: str, stories: int, tokens: int
    ) -> None:
        try:
            for quota in self.quotas:
                key, cost = quota.key(client), quota.cost(stories, tokens)
                if wait := await shared.take(key, quota.amount, quota.seconds, cost):
                    self._refuse(quota, wait)
                reservation._in_redis.append((quota, key, cost))
        except RedisUnavailableError:
            return  # the windows in memory decide

    def _refuse(self, quota: Quota, wait: float) -> None:
        self.refusals[quota.scope, quota.resource] += 1
        whose = "one client" if quota.scope == "client" else "all clients together"
        raise LimitError(f"the limit of {whose} is reached: {quota}", wait, quota.scope)
