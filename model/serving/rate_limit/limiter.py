"""Lets stories in, or says when to come back; afterwards only what was really written has counted.

A story reserves all the tokens that it may have, and gives back at its end what it did not use; so many short
stories at once cannot slip through that would be too much if they were long. What is counted in this process is
asked first: the shared windows in Redis can only be fuller, so a client that is refused here costs no question.
And when Redis is gone, the windows here know what this process has let in, and go on alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.errors import InputError, LimitError
from model.generation import GenerationRequest
from model.serving.rate_limit.clients import Clients
from model.serving.rate_limit.quotas import OFF, Quota, Resource, Scope, read_quotas
from model.serving.rate_limit.shared import SharedWindows
from model.serving.rate_limit.windows import MemoryWindows, Taken
from model.serving.redis import RedisGoneError, RedisLink

if TYPE_CHECKING:
    from model.settings import Settings

SETTINGS: tuple[tuple[str, Scope, Resource, str], ...] = (
    ("STORY_LIMIT_STORIES", "client", "stories", "30/minute"),
    ("STORY_LIMIT_TOKENS", "client", "tokens", "20000/minute"),
    ("STORY_LIMIT_ALL_STORIES", "all", "stories", "600/minute"),
    ("STORY_LIMIT_ALL_TOKENS", "all", "tokens", "200000/minute"),
)
"""Names of the settings, and what holds in production where they are unset."""


class Ticket:
    """The right to tell stories. `close` it when they have ended, however that was; only the first time counts."""

    def __init__(self, shared: SharedWindows | None = None) -> None:
        self._shared = shared
        self._here: list[tuple[Quota, Taken]] = []
        self._there: list[tuple[Quota, str, int]] = []
        self._begun = 0
        self._written = 0
        self._open = True

    def begun(self) -> None:
        """One of the stories has begun."""
        self._begun += 1

    def wrote(self, tokens: int) -> None:
        """So many tokens of the stories were written."""
        self._written += tokens

    def close(self) -> None:
        """Give back what was reserved and not used."""
        if not self._open:
            return
        self._open = False
        for quota, taken in self._here:
            MemoryWindows.give_back(taken, self._unused(quota, taken.cost))
        if self._shared is not None:
            for quota, key, cost in self._there:
                self._shared.give_back(key, self._unused(quota, cost))

    def _unused(self, quota: Quota, cost: int) -> int:
        return max(0, cost - quota.cost(self._begun, self._written))


class Limiter:
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
    def of(cls, settings: Settings, link: RedisLink | None = None) -> Limiter:
        """The limiter that the settings ask for; unset limits hold in production only."""
        quotas: list[Quota] = []
        for name, scope, resource, usual in SETTINGS:
            text = getattr(settings, name.lower()) or (usual if settings.stage == "PROD" else OFF)
            quotas += read_quotas(name, text, scope, resource)
        return cls(quotas, clients=Clients.read(settings.story_trusted_proxies), link=link)

    @property
    def windows(self) -> int:
        """Windows that are counted here."""
        return len(self._windows)

    async def admit(self, client: str, requests: Sequence[GenerationRequest]) -> Ticket:
        """Reserve what these stories of one request may come to.

        Raises `LimitError`, with the time to wait, when that is too much now, and `InputError` when it always is.
        """
        ticket = Ticket(self._shared)
        stories, tokens = len(requests), sum(request.max_tokens for request in requests)
        try:
            for quota in self.quotas:
                self._take_here(ticket, quota, client, quota.cost(stories, tokens))
            if self._shared is not None:
                await self._take_there(self._shared, ticket, client, stories, tokens)
        except BaseException:
            ticket.close()
            raise
        return ticket

    def _take_here(self, ticket: Ticket, quota: Quota, client: str, cost: int) -> None:
        if cost > quota.amount:
            field = "n" if quota.resource == "stories" else "max_tokens"
            raise InputError(field, f"asks for more than the limit here allows at all: {quota}")
        taken = self._windows.take(quota.key(client), quota.amount, quota.seconds, cost)
        if isinstance(taken, float):
            self._refuse(quota, taken)
        else:
            ticket._here.append((quota, taken))

    async def _take_there(
        self, shared: SharedWindows, ticket: Ticket, client: str, stories: int, tokens: int
    ) -> None:
        try:
            for quota in self.quotas:
                key, cost = quota.key(client), quota.cost(stories, tokens)
                if wait := await shared.take(key, quota.amount, quota.seconds, cost):
                    self._refuse(quota, wait)
                ticket._there.append((quota, key, cost))
        except RedisGoneError:
            return  # what is counted here stands

    def _refuse(self, quota: Quota, wait: float) -> None:
        self.refusals[quota.scope, quota.resource] += 1
        whose = "one client" if quota.scope == "client" else "all clients together"
        raise LimitError(f"the limit of {whose} is reached: {quota}", wait, quota.scope)
