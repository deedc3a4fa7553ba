"""Rate limits on requests and tokens, for each client and for all together.

    limiter = Limiter.from_settings(settings, redis)
    reservation = await limiter.admit(limiter.clients.of(scope), requests)    # or LimitError, with `retry_after`
    reservation.commit(stories=1, tokens=3)
    reservation.release()

A request reserves `max_tokens` against the limits; unused tokens are refunded when it ends. So many short stories at
once cannot slip through that would be too much if they were long. The windows in memory are asked first: the shared
ones in Redis can only be fuller, so a refusal here costs no round trip. While Redis is down, the windows in memory hold
what this process has admitted, and go on alone.
"""

import contextlib
import ipaddress
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self

from limits.aio.storage import RedisStorage
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import Headers

from model.errors import InputError, LimitError
from model.generation import GenerationRequest
from model.serving.redis import RedisLink, RedisUnavailableError
from model.serving.session import UNKNOWN
from model.settings import MAX_PROXIES, OFF, Settings, parse_limits

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

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

IPV6_PREFIX = 64
"""Bits that identify an IPv6 client: one household or host has all addresses of such a network."""
MAX_WINDOWS = 100_000
"""Windows in memory; beyond, the least recently used are forgotten."""
PREFIX = "story:limits"


class Clients:
    """Finds the client address that a rate limit counts by, also behind trusted proxies.

    A proxy appends the address of its peer to `X-Forwarded-For`. Entries left of the last trusted proxy's own were sent
    by the client and may be forged, so the list is read from its right end, and only as far as trusted proxies wrote
    it.
    """

    def __init__(self, trusted: Sequence[Network] | int = ()) -> None:
        """`trusted`: networks of proxies, or how many proxies stand in front."""
        self._trusted = trusted

    def of(self, scope: Any) -> str:
        """Return the client of an ASGI request, as it is counted."""
        peer = scope.get("client")
        return self.client(peer[0] if peer else None, Headers(scope=scope).getlist("x-forwarded-for"))

    def client(self, peer: str | None, forwarded: Sequence[str]) -> str:
        """Return the client of a connection from `peer` with these `X-Forwarded-For` headers, in their order."""
        entries = [entry.strip() for entry in ",".join(forwarded).rsplit(",", MAX_PROXIES)[-MAX_PROXIES:]]
        chain = [_address(entry) for entry in (*filter(None, entries), peer)]
        if isinstance(self._trusted, int):
            # Fewer entries than proxies: some proxy was bypassed, or adds none. The first known entry counts.
            return grouped(chain[max(0, len(chain) - 1 - self._trusted)])
        found = chain.pop()
        # Where an entry is no address, the proxy hides its peer.
        while chain and chain[-1] and found and any(found in network for network in self._trusted):
            found = chain.pop()
        return grouped(found)


def grouped(address: Address | None) -> str:
    """Return the name that an address is counted by: itself, or the /64 network of an IPv6 one."""
    if address is None:
        return UNKNOWN
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address), IPV6_PREFIX), strict=False))
    return str(address)


def _address(text: str | None) -> Address | None:
    """Parse `192.0.2.7`, `192.0.2.7:80`, `2001:db8::1`, `[2001:db8::1]:80`; None where there is none."""
    if not text:
        return None
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


@dataclass(slots=True)
class Taken:
    """What one request took from a window."""

    at: float
    cost: int
    window: "_Window | None"


@dataclass(slots=True)
class _Window:
    seconds: float
    used: int = 0
    entries: deque[Taken] = field(default_factory=deque)
    """Oldest first."""

    def expire(self, now: float) -> None:
        """Forget what was taken longer ago than the window reaches."""
        while self.entries and self.entries[0].at <= now - self.seconds:
            old = self.entries.popleft()
            self.used -= old.cost
            old.window = None


class MemoryWindows:
    """Windows in memory, by name. Used from one thread at a time.

    The `limits` library has such windows too. They look through all clients at each request (1.3 ms of processor time
    for ten clients, 29 ms for ten thousand; these take 8 µs with five thousand) and cannot refund.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, most: int = MAX_WINDOWS) -> None:
        self._clock = clock
        self._most = most
        self._windows: OrderedDict[str, _Window] = OrderedDict()  # in the order of their last use

    def __len__(self) -> int:
        return len(self._windows)

    def take(self, key: str, amount: int, seconds: float, cost: int) -> Taken | float:
        """Take `cost` from the window `key`, which allows `amount` in any `seconds`; `cost` is at most `amount`.

        Where that is too much now, take nothing and return the seconds until it may be taken.
        """
        now = self._clock()
        self._tidy(now)
        window = self._windows.setdefault(key, _Window(seconds))
        self._windows.move_to_end(key)
        window.expire(now)
        if window.used + cost <= amount:
            taken = Taken(now, cost, window)
            window.entries.append(taken)
            window.used += cost
            return taken
        over = window.used + cost - amount
        for entry in window.entries:
            over -= entry.cost
            if over <= 0:
                return max(entry.at + seconds - now, 1e-3)
        raise AssertionError("a full window holds the entries that fill it")

    @staticmethod
    def refund(taken: Taken, cost: int) -> None:
        """Give back part of what was taken, all at most; expired entries are back already."""
        if taken.window is not None:
            taken.window.used -= cost
            taken.cost -= cost

    def _tidy(self, now: float) -> None:
        """Drop empty windows, two at most, so that they go faster than new ones come."""
        for _ in range(2):
            key = next(iter(self._windows), None)
            if key is None:
                return
            window = self._windows[key]
            window.expire(now)
            if window.entries and len(self._windows) < self._most:
                return
            del self._windows[key]


class RedisWindows:
    """Windows in Redis: those of the `limits` library, with a refund. Raises `RedisUnavailableError`.

    Times are wall clock, as the library has it, so the replicas' clocks have to agree to about a second.
    """

    def __init__(self, redis: RedisLink) -> None:
        self._redis = redis
        # With a pool, the address is not used for connecting.
        self._storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=PREFIX,
            connection_pool=redis.pool,  # type: ignore[arg-type]
        )

    async def take(self, key: str, amount: int, seconds: int, cost: int) -> float:
        """Take `cost` as `MemoryWindows.take` does; returns 0, or the seconds until it may be taken."""
        if await self._redis.call(lambda: self._storage.acquire_entry(key, amount, seconds, cost)):
            return 0.0
        # Newest first: when the entry at this place has expired, there is room.
        blocking = await self._redis.call(lambda: self._redis.client.lindex(f"{PREFIX}:{key}", amount - cost))
        return 1e-3 if blocking is None else max(float(blocking) + seconds - time.time(), 1e-3)

    def refund(self, key: str, cost: int) -> None:
        """Give back so much in the background.

        The newest entries go, which need not be those that were taken: the rest expires earlier by as much as the
        request lasted. The library does not return the time under which it stored them.
        """
        if cost > 0:
            self._redis.fire_and_forget(lambda: self._redis.client.lpop(f"{PREFIX}:{key}", cost))


@dataclass(frozen=True, slots=True)
class Quota:
    """One amount in one period."""

    scope: Scope
    resource: Resource
    amount: int
    """Units allowed in a period."""
    seconds: int
    """The period."""
    unit: int
    """Stories or tokens that count as one. Above 1 only where more than `MAX_UNITS` tokens are allowed."""
    period: str
    """In words: `minute`, `2 days`."""

    def key(self, client: str) -> str:
        """Return the name of the window that counts for `client`."""
        who = client if self.scope == "client" else ""
        return f"{self.scope}/{self.resource}/{who}/{self.amount}/{self.seconds}"

    def cost(self, stories: int, tokens: int) -> int:
        """Return the cost of so many stories, of so many tokens together, in units."""
        return math.ceil((stories if self.resource == "stories" else tokens) / self.unit)

    def __str__(self) -> str:
        return f"{self.amount * self.unit} {self.resource} per {self.period}"


def quotas_of(text: str, scope: Scope, resource: Resource) -> list[Quota]:
    """Return the quotas of a setting: see `model.settings.parse_limits`."""
    quotas = []
    for item in parse_limits(text):
        unit = max(1, math.ceil(item.amount / MAX_UNITS)) if resource == "tokens" else 1
        name, many = item.GRANULARITY.name, item.multiples
        period = f"{many} {name}s" if many > 1 else name
        quotas.append(Quota(scope, resource, item.amount // unit, item.get_expiry(), unit, period))
    return quotas


class Reservation:
    """Tokens and stories reserved for one request; `release` refunds what was not committed."""

    def __init__(self) -> None:
        self._held: list[tuple[Quota, int, Callable[[int], None]]] = []
        self._stories = 0
        self._tokens = 0

    def hold(self, quota: Quota, cost: int, refund: Callable[[int], None]) -> None:
        """Add what was taken from a window; `refund` gives so much of it back."""
        self._held.append((quota, cost, refund))

    def commit(self, *, stories: int = 0, tokens: int = 0) -> None:
        """Count stories that were started and tokens that were generated against the reservation."""
        self._stories += stories
        self._tokens += tokens

    def release(self) -> None:
        """Refund what was reserved and not committed; only the first call counts."""
        while self._held:
            quota, cost, refund = self._held.pop()
            refund(max(0, cost - quota.cost(self._stories, self._tokens)))


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
    def from_settings(cls, settings: Settings, redis: RedisLink | None = None) -> Self:
        """Make the limiter that the settings ask for; unset limits hold in production only."""
        quotas: list[Quota] = []
        for name, scope, resource, default in SETTINGS:
            text = getattr(settings, name.lower()) or (default if settings.stage == "PROD" else OFF)
            quotas += quotas_of(text, scope, resource)
        return cls(quotas, clients=Clients(settings.story_trusted_proxies or ()), redis=redis)

    async def admit(
        self, client: str, requests: Sequence[GenerationRequest], stories: int | None = None
    ) -> Reservation:
        """Reserve what these stories of one request may come to; they count as `stories` (None: as many as there are).

        Raises `LimitError`, with the time to wait, when that is too much now, and `InputError` when it always is.
        """
        reservation = Reservation()
        stories = len(requests) if stories is None else stories
        tokens = sum(request.max_tokens for request in requests)
        costs = [(quota, quota.key(client), quota.cost(stories, tokens)) for quota in self.quotas]
        try:
            for quota, key, cost in costs:
                if cost > quota.amount:
                    field = "n" if quota.resource == "stories" else "max_tokens"
                    raise InputError(field, f"asks for more than the limit here allows at all: {quota}")
                taken = self._windows.take(key, quota.amount, quota.seconds, cost)
                if isinstance(taken, float):
                    raise self._refusal(quota, taken)
                reservation.hold(quota, cost, partial(MemoryWindows.refund, taken))
            if self._shared is not None:
                with contextlib.suppress(RedisUnavailableError):  # then the windows in memory decide
                    for quota, key, cost in costs:
                        if wait := await self._shared.take(key, quota.amount, quota.seconds, cost):
                            raise self._refusal(quota, wait)
                        reservation.hold(quota, cost, partial(self._shared.refund, key))
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

    def _refusal(self, quota: Quota, wait: float) -> LimitError:
        self.refusals[quota.scope, quota.resource] += 1
        whose = "one client" if quota.scope == "client" else "all clients together"
        return LimitError(f"the limit of {whose} is reached: {quota}", wait, quota.scope)
