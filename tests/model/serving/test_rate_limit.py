"""Rate limits: what a setting means, whose request it is, what a window admits, and what is refunded."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import parse
from limits.storage import memory as library
from limits.strategies import MovingWindowRateLimiter

from model.errors import InputError, LimitError
from model.generation import GenerationRequest
from model.serving.rate_limit import (
    MAX_UNITS,
    Clients,
    Limiter,
    MemoryWindows,
    Quota,
    RedisWindows,
    Taken,
    grouped,
    quotas_of,
)
from model.serving.redis import RedisLink
from model.serving.session import UNKNOWN
from model.settings import MAX_PROXIES, load_settings
from tests.redis_server import redis_server, settled

TIMES = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400}


@given(
    amount=st.integers(1, 10**9),
    many=st.integers(1, 30),
    time=st.sampled_from(sorted(TIMES)),
    spelled=st.sampled_from(["{}/{} {}s", "{} per {} {}", " {}/{}{} "]),
)
def test_a_limit_says_an_amount_and_a_time(amount: int, many: int, time: str, spelled: str) -> None:
    (quota,) = quotas_of(spelled.format(amount, many, time), "client", "stories")
    assert (quota.amount, quota.unit, quota.seconds) == (amount, 1, many * TIMES[time])
    assert quota.cost(stories=3, tokens=100) == 3


@given(amount=st.integers(1, 10**9), tokens=st.integers(1, 10**6))
def test_very_many_tokens_are_counted_in_larger_units_and_never_too_low(amount: int, tokens: int) -> None:
    (quota,) = quotas_of(f"{amount}/minute", "all", "tokens")
    assert quota.amount <= MAX_UNITS
    assert amount * (1 - 2 / MAX_UNITS) <= quota.amount * quota.unit <= amount
    assert quota.cost(1, tokens) * quota.unit >= tokens
    assert quota.cost(1, tokens) == math.ceil(tokens / quota.unit)


def test_several_limits_hold_together_and_each_has_a_window_of_its_own() -> None:
    quotas = quotas_of("5/second; 2000/day", "client", "stories")
    assert [str(quota) for quota in quotas] == ["5 stories per second", "2000 stories per day"]
    assert len({quota.key("192.0.2.1") for quota in quotas}) == 2


def test_what_all_share_has_one_window_and_clients_have_their_own() -> None:
    (mine,) = quotas_of("5/minute", "client", "stories")
    (ours,) = quotas_of("5/minute", "all", "stories")
    assert mine.key("192.0.2.1") != mine.key("192.0.2.2")
    assert ours.key("192.0.2.1") == ours.key("192.0.2.2")


def test_off_is_no_limit() -> None:
    assert quotas_of(" Off ", "client", "stories") == []


@given(st.text(max_size=40))
def test_any_other_text_is_refused(text: str) -> None:
    try:
        quotas = quotas_of(text, "client", "tokens")
    except ValueError:
        return
    assert all(quota.amount >= 1 and quota.seconds >= 1 for quota in quotas)


INSIDE = st.ip_addresses(v=4, network="10.0.0.0/8").map(str)
OUTSIDE = (st.ip_addresses(v=4, network="192.0.2.0/24") | st.ip_addresses(v=6, network="2001:db8::/32")).map(str)
RUBBISH = st.text(st.characters(codec="latin-1", exclude_characters=",[]:"), max_size=12) | INSIDE | OUTSIDE


def written(address: str, port: bool) -> str:
    """An entry as some proxies write it."""
    if not port:
        return address
    return f"[{address}]:4711" if ":" in address else f"{address}:4711"


def behind(proxies: str | None) -> Clients:
    """The clients of a service behind these proxies, as the setting has them."""
    return Clients(load_settings(story_trusted_proxies=proxies).story_trusted_proxies or ())


def name(address: str) -> str:
    return grouped(ipaddress.ip_address(address))


@given(peer=OUTSIDE, headers=st.lists(RUBBISH, max_size=6), trusted=st.sampled_from([None, "10.0.0.0/8"]))
def test_what_a_stranger_says_of_itself_counts_nothing(peer: str, headers: list[str], trusted: str | None) -> None:
    assert behind(trusted).client(peer, headers) == name(peer)


@given(
    client=OUTSIDE,
    invented=st.lists(RUBBISH, max_size=8),
    proxies=st.lists(INSIDE, min_size=1, max_size=5),
    port=st.booleans(),
    split=st.integers(0, 10),
)
def test_behind_trusted_proxies_it_is_the_rightmost_address_that_is_none_of_them(
    client: str, invented: list[str], proxies: list[str], port: bool, split: int
) -> None:
    *between, peer = proxies
    entries = [*invented, written(client, port), *between]
    headers = [", ".join(entries[:split]), ",".join(entries[split:])]
    assert behind("10.0.0.0/8").client(peer, headers) == name(client)


@given(client=OUTSIDE, invented=st.lists(RUBBISH, max_size=8), proxies=st.lists(OUTSIDE, min_size=1, max_size=5))
def test_where_proxies_are_counted_it_is_the_address_that_the_first_of_them_was_asked_from(
    client: str, invented: list[str], proxies: list[str]
) -> None:
    *between, peer = proxies
    entries = [entry for entry in [*invented, client, *between] if entry.strip()]
    assert behind(str(len(proxies))).client(peer, [", ".join(entries)]) == name(client)


@given(
    peer=RUBBISH | st.none(), headers=st.lists(RUBBISH, max_size=3), trusted=st.sampled_from(["10.0.0.0/8", "2", None])
)
def test_nothing_that_is_sent_makes_it_fail(peer: str | None, headers: list[str], trusted: str | None) -> None:
    found = behind(trusted).client(peer, headers)
    assert found == UNKNOWN or ipaddress.ip_network(found).num_addresses >= 1


def test_a_header_as_long_as_a_server_takes_is_read_from_its_end_only() -> None:
    entries = ["192.0.2.1", *["10.0.0.1"] * 8_000]
    assert behind("10.0.0.0/8").client("10.0.0.2", [",".join(entries)]) == "10.0.0.1"
    short = ["192.0.2.1", *["10.0.0.1"] * (MAX_PROXIES - 1)]
    assert behind("10.0.0.0/8").client("10.0.0.2", [",".join(short)]) == "192.0.2.1"


def test_a_proxy_that_hides_its_client_is_the_client() -> None:
    assert behind("10.0.0.0/8").client("10.0.0.2", ["192.0.2.1, unknown"]) == "10.0.0.2"
    assert behind("10.0.0.0/8").client("10.0.0.2", []) == "10.0.0.2"


@given(st.ip_addresses(v=6, network="2001:db8:1:2::/64"))
def test_addresses_of_one_ipv6_network_are_one_client(address: ipaddress.IPv6Address) -> None:
    assert Clients().client(str(address), []) == "2001:db8:1:2::/64"


def test_an_ipv4_address_is_the_same_in_ipv6_form_and_a_zone_is_no_part_of_it() -> None:
    assert Clients().client("::ffff:192.0.2.7", []) == Clients().client("192.0.2.7", []) == "192.0.2.7"
    assert Clients().client("fe80::1%eth0", []) == "fe80::/64"
    assert behind("10.0.0.0/8").client("::ffff:10.0.0.1", ["192.0.2.7"]) == "192.0.2.7"


def test_a_connection_without_an_address_has_a_name_too() -> None:
    assert Clients().of({"client": None, "headers": []}) == UNKNOWN
    assert behind("1").of({"headers": [(b"x-forwarded-for", b"192.0.2.7")]}) == "192.0.2.7"


STEPS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=40)
"""(seconds until it, its cost) of each request."""


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def taken(found: Taken | float) -> Taken:
    assert isinstance(found, Taken)
    return found


@given(STEPS, st.integers(5, 12))
def test_a_window_lets_in_what_a_list_of_all_that_was_let_in_allows(steps: Any, amount: int) -> None:
    clock, let_in = Clock(), list[tuple[float, int]]()
    windows = MemoryWindows(clock=clock)
    for pause, cost in steps:
        clock.now += pause
        used = sum(entry for at, entry in let_in if at > clock.now - 60)
        found = windows.take("k", amount, 60, cost)
        assert isinstance(found, Taken) == (used + cost <= amount)
        if isinstance(found, Taken):
            let_in.append((clock.now, cost))
        else:
            # At the time that was returned there is capacity, and just before there is none.
            later = [sum(c for at, c in let_in if at > clock.now + found - 60 + early) for early in (0, -0.5)]
            assert [used + cost <= amount for used in later] == [True, False]


@given(STEPS)
def test_a_window_decides_as_the_librarys_does(steps: Any) -> None:
    clock = Clock()
    windows = MemoryWindows(clock=clock)
    with pytest.MonkeyPatch.context() as patch:
        # Its time is the wall's, and it clears up in a thread of its own: both are held still here.
        patch.setattr("limits.storage.memory.time.time", clock)
        patch.setattr(library.MemoryStorage, "_MemoryStorage__schedule_expiry", lambda _self: None)
        storage = library.MemoryStorage()
        storage.timer.cancel()
        limiter, limit = MovingWindowRateLimiter(storage), parse("12/minute")
        for pause, cost in steps:
            clock.now += pause + 0.0137  # never to the edge: one of them still counts what is just 60 s old
            assert limiter.hit(limit, "k", cost=cost) == isinstance(windows.take("k", 12, 60, cost), Taken)


def test_what_was_not_used_is_there_again_at_once_and_only_once_it_was_taken() -> None:
    clock = Clock()
    windows = MemoryWindows(clock=clock)
    first = taken(windows.take("k", 10, 60, 8))
    assert windows.take("k", 10, 60, 3) == 60
    windows.refund(first, 5)
    taken(windows.take("k", 10, 60, 7))
    assert windows.take("k", 10, 60, 1) == 60
    clock.now += 61
    taken(windows.take("k", 10, 60, 10))
    windows.refund(first, 3)  # forgotten long ago: nothing comes of it
    assert windows.take("k", 10, 60, 1) == 60


def test_windows_that_have_gone_empty_leave_no_memory_behind() -> None:
    clock = Clock()
    windows = MemoryWindows(clock=clock)
    for client in range(1000):
        taken(windows.take(str(client), 5, 60, 1))
    clock.now += 61
    for client in range(600):
        taken(windows.take(f"new {client % 10}", 500, 60, 1))
    assert len(windows) <= 11


def test_however_many_clients_come_the_windows_are_bounded() -> None:
    windows = MemoryWindows(clock=Clock(), most=100)
    for client in range(1000):
        taken(windows.take(str(client), 5, 60, 1))
    assert len(windows) <= 101
    assert windows.take("999", 1, 60, 1) == 60, "the last clients are kept"


def left(began: float) -> float:
    """Seconds that a window of a minute has left at least, if it began no earlier than `began`."""
    return 59.9 - (time.monotonic() - began)


async def test_the_shared_windows_in_a_redis_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.serving.redis.TIMEOUT", 10.0)  # a busy machine's Redis is there too
    with redis_server() as server:
        mine, theirs = RedisLink(server.url), RedisLink(server.url)
        here, there = RedisWindows(mine), RedisWindows(theirs)
        began = time.monotonic()
        assert await here.take("k", 10, 60, 8) == 0
        assert left(began) < await there.take("k", 10, 60, 3) <= 60
        assert await there.take("other", 10, 60, 3) == 0
        here.refund("k", 5)
        await settled(mine)
        assert await there.take("k", 10, 60, 7) == 0
        assert left(began) < await here.take("k", 10, 60, 1) <= 60
        assert await here.take("brief", 1, 1, 1) == 0
        while wait := await here.take("brief", 1, 1, 1):  # none on a machine that took a second for this
            assert 0 < wait <= 1
            await asyncio.sleep(wait)
        await mine.aclose()
        await theirs.aclose()


def quotas(**texts: str) -> list[Quota]:
    return [
        quota
        for name, text in texts.items()
        for quota in quotas_of(text, "all" if "all" in name else "client", name.split("_")[-1])  # type: ignore[arg-type]
    ]


def stories(count: int = 1, max_tokens: int = 100) -> list[GenerationRequest]:
    return [GenerationRequest(prompt="Once", max_tokens=max_tokens)] * count


async def test_a_client_gets_its_share_and_hears_when_there_is_more() -> None:
    limiter = Limiter(quotas(client_stories="3/minute"))
    for _ in range(3):
        (await limiter.admit("a", stories())).commit(stories=1)
    with pytest.raises(LimitError, match="one client is reached: 3 stories per minute") as refused:
        await limiter.admit("a", stories())
    assert 59 < refused.value.retry_after <= 60
    assert refused.value.scope == "client"
    await limiter.admit("b", stories(3))
    assert limiter.refusals == {("client", "stories"): 1}


async def test_all_together_get_theirs() -> None:
    limiter = Limiter(quotas(all_stories="2/minute", client_stories="2/minute"))
    await limiter.admit("a", stories())
    await limiter.admit("b", stories())
    with pytest.raises(LimitError, match="all clients together is reached"):
        await limiter.admit("c", stories())
    # Who asks too much is refused by its own limit and takes nothing from what all have.
    assert limiter.refusals == {("all", "stories"): 1}


async def test_a_story_reserves_all_it_may_have_and_pays_for_what_it_got() -> None:
    limiter = Limiter(quotas(client_tokens="1000/minute"))
    first = await limiter.admit("a", stories(max_tokens=600))
    with pytest.raises(LimitError):
        await limiter.admit("a", stories(max_tokens=600))
    first.commit(stories=1)
    first.commit(tokens=150)
    first.release()
    first.release()
    await limiter.admit("a", stories(max_tokens=850))
    with pytest.raises(LimitError):
        await limiter.admit("a", stories(max_tokens=1))


async def test_a_story_that_never_began_costs_nothing() -> None:
    limiter = Limiter(quotas(client_stories="1/minute", client_tokens="100/minute"))
    (await limiter.admit("a", stories())).release()
    await limiter.admit("a", stories())


async def test_a_refusal_takes_nothing_from_the_limits_that_had_capacity() -> None:
    limiter = Limiter(quotas(client_stories="9/minute", client_tokens="100/minute"))
    reservation = await limiter.admit("a", stories())
    for _ in range(20):
        with pytest.raises(LimitError):
            await limiter.admit("a", stories())
    reservation.release()
    for _ in range(9):
        await limiter.admit("a", stories(max_tokens=1))


async def test_what_can_never_be_allowed_is_a_wrong_request_and_no_matter_of_waiting() -> None:
    limiter = Limiter(quotas(client_stories="2/minute", client_tokens="100/minute"))
    with pytest.raises(InputError, match="max_tokens asks for more than the limit here allows at all: 100 tokens"):
        await limiter.admit("a", stories(max_tokens=101))
    with pytest.raises(InputError, match="n asks for more than the limit here allows at all: 2 stories"):
        await limiter.admit("a", stories(3, max_tokens=1))
    await limiter.admit("a", stories(max_tokens=100))


@given(st.lists(st.tuples(st.integers(1, 400), st.floats(0, 1), st.booleans()), max_size=30))
async def test_never_more_tokens_are_written_and_reserved_than_the_limit_allows(steps: Any) -> None:
    limiter, written, running = Limiter(quotas(client_tokens="1000/minute")), 0, list[Any]()
    for asked, share, ends in steps:
        try:
            reservation = await limiter.admit("a", stories(max_tokens=asked))
        except LimitError:
            assert written + sum(most for _, most, _ in running) + asked > 1000
            continue
        reservation.commit(stories=1)
        running.append((reservation, asked, int(asked * share)))
        assert written + sum(most for _, most, _ in running) <= 1000
        if ends:
            done, _, tokens = running.pop(0)
            done.commit(tokens=tokens)
            done.release()
            written += tokens


async def test_replicas_share_their_limits_in_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.serving.redis.TIMEOUT", 10.0)  # a busy machine's Redis is there too
    with redis_server() as server:
        links = [RedisLink(server.url) for _ in range(2)]
        first, second = (
            Limiter(quotas(client_stories="2/minute", all_tokens="900/minute"), redis=link) for link in links
        )
        reservation = await first.admit("a", stories(max_tokens=800))
        with pytest.raises(LimitError, match="all clients together"):
            await second.admit("b", stories(max_tokens=800))
        reservation.commit(stories=1)
        reservation.commit(tokens=20)
        reservation.release()
        await settled(links[0])
        await second.admit("a", stories(max_tokens=800))
        with pytest.raises(LimitError, match="one client"):
            await second.admit("a", stories(max_tokens=1))
        assert second.refusals == {("all", "tokens"): 1, ("client", "stories"): 1}
        server.stop()
        # Redis is gone: each goes on with what it has let in itself.
        await second.admit("a", stories(max_tokens=1))
        with pytest.raises(LimitError):
            await second.admit("a", stories(max_tokens=1))
        for link in links:
            await link.aclose()


def test_in_production_there_are_limits_unless_they_are_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Limiter.from_settings(load_settings()).quotas == []
    monkeypatch.setenv("STAGE", "PROD")
    monkeypatch.setenv("STORY_LIMIT_TOKENS", "off")
    monkeypatch.setenv("STORY_LIMIT_STORIES", "2/second;9/hour")
    assert [str(quota) for quota in Limiter.from_settings(load_settings()).quotas] == [
        "2 stories per second",
        "9 stories per hour",
        "600 stories per minute",
        "200000 tokens per minute",
    ]
