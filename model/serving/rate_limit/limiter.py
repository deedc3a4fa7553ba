"""Lets stories in, or says when to come back; afterwards only what was really written has counted.

A story reserves all the tokens that it may have, and gives back at its end what it did not use; so many short
stories at once cannot slip through that would be too much if they were long. What is counted in this process is
asked first: the shared windows in Redis can only be fuller, so a client that is refused here costs no question.
And when Redis is gone, the windows here know what this process has let in, and go on alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from model.errors import InputError, LimitError
from model.generation import GenerationRequest
from model.serving.rate_limit.clients import Clients
from model.serving.rate_limit.quotas import OFF, Quota, Resource, Scope, read_quotas
from model.serving.rate_limit.shared import SharedWindows
from model.serving.rate_limit.windows import MemoryWindows, Taken
from model.serving.redis import RedisLink, RedisUnavailableError

if TYPE_CHECKING:
    from model.settings import Settings

SETTINGS: tuple[tuple[str, Scope, Resource, str], ...] = (
    ("STORY_LIMIT_STORIES", "client", "stories", "30/minute"),
    ("STORY_LIMIT_TOKENS", "client", "tokens", "20000/minute"),
    ("STORY_LIMIT_ALL_STORIES", "all", "stories", "600/minute"),
    ("STORY_LIMIT_ALL_TOKENS", "all", "tokens", "200000/minute"),
)
"""Names of the settings, and what holds in production where they are unset."""


class Reservation:
    """Tokens and stories reserved for one request; unused ones are refunded by `release`."""

    def __init__(self, shared: SharedWindows | None = None) -> None:
        self._shared = shared
        self._here: list[tuple[Quota, Taken]] = []
        self._there: list[tuple[Quota, str, int]] = []
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
        for quota, taken in self._here:
            MemoryWindows.give_back(taken, self._unused(quota, taken.cost))
        if self._shared is not None:
            for quota, key, cost in self._there:
                self._shared.give_back(key, self._unused(quota, cost))

    def _unused(self, quota: Quota, cost: int) -> int:
        return max(0, cost - quota.cost(self._stories, self._tokens))


class Limiter(Collector):
    """See the module. Without quotas it lets everything in, at no cost. Used from one event loop."""

    def __init__(
        self,
        quotas: Sequence[Quota] = (),
        *,
        clients: Clients | None = None,
        link: RedisLink | None = None,
        windows: MemoryWindows | None = None,
    ) -> None:
        # Those of a client come first: who asks too much must not use up what all have.
        self.quotas = sorted(quotas, key=lambda quota: quota.scope == "all")
        self.clients = clients or Clients()
        self._windows = windows or MemoryWindows()
        self._shared = SharedWindows(link) if link is not None and quotas else None
        self.refusals: Counter[tuple[Scope, Resource]] = Counter()
        """Requests that were refused, by the quota that they met."""

    @classmethod
    def from_settings(cls, settings: Settings, link: RedisLink | None = None) -> Limiter:
        """The limiter that the settings ask for; unset limits hold in production only."""
        quotas: list[Quota] = []
        for name, scope, resource, usual in SETTINGS:
            text = getattr(settings, name.lower()) or (usual if settings.stage == "PROD" else OFF)
            quotas += read_quotas(name, text, scope, resource)
        return cls(quotas, clients=Clients.read(settings.story_trusted_proxies), link=link)

    def describe(self) -> Iterable[Metric]:
        return ()

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

    async def admit(self, client: str, requests: Sequence[GenerationRequest]) -> Reservation:
        """Reserve what these stories of one request may come to.

        Raises `LimitError`, with the time to wait, when that is too much now, and `InputError` when it always is.
        """
        reservation = Reservation(self._shared)
        stories, tokens = len(requests), sum(request.max_tokens for request in requests)
        try:
            for quota in self.quotas:
                self._take_here(reservation, quota, client, quota.cost(stories, tokens))
            if self._shared is not None:
                await self._take_there(self._shared, reservation, client, stories, tokens)
        except BaseException:
            reservation.release()
            raise
        return reservation

    def _take_here(self, reservation: Reservation, quota: Quota, client: str, cost: int) -> None:
        if cost > quota.amount:
            field = "n" if quota.resource == "stories" else "max_tokens"
            raise InputError(field, f"asks for more than the limit here allows at all: {quota}")
        taken = self._windows.take(quota.key(client), quota.amount, quota.seconds, cost)
        if isinstance(taken, float):
            self._refuse(quota, taken)
        else:
            reservation._here.append((quota, taken))

    async def _take_there(
        self, shared: SharedWindows, reservation: Reservation, client: str, stories: int, tokens: int
    ) -> None:
        try:
            for quota in self.quotas:
                key, cost = quota.key(client), quota.cost(stories, tokens)
                if wait := await shared.take(key, quota.amount, quota.seconds, cost):
                    self._refuse(quota, wait)
                reservation._there.append((quota, key, cost))
        except RedisUnavailableError:
            return  # what is counted here stands

    def _refuse(self, quota: Quota, wait: float) -> None:
        self.refusals[quota.scope, quota.resource] += 1
        whose = "one client" if quota.scope == "client" else "all clients together"
        raise LimitError(f"the limit of {whose} is reached: {quota}", wait, quota.scope)
