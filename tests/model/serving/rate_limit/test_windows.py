"""Moving windows: never more than allowed in any time, and never less than could be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import parse
from limits.storage import memory as library
from limits.strategies import MovingWindowRateLimiter

from model.serving.rate_limit.shared import SharedWindows
from model.serving.rate_limit.windows import MemoryWindows, Taken
from model.serving.redis import RedisLink
from tests.redis_server import redis_server

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
            # At the time that was told there is room, and just before there is none.
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
    windows.give_back(first, 5)
    taken(windows.take("k", 10, 60, 7))
    assert windows.take("k", 10, 60, 1) == 60
    clock.now += 61
    taken(windows.take("k", 10, 60, 10))
    windows.give_back(first, 3)  # forgotten long ago: nothing comes of it
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
    assert windows.take("999", 1, 60, 1) == 60, "those who came last are remembered"


async def test_the_shared_windows_in_a_redis_do_the_same() -> None:
    with redis_server() as server:
        mine, theirs = RedisLink(server.url), RedisLink(server.url)
        here, there = SharedWindows(mine), SharedWindows(theirs)
        assert await here.take("k", 10, 60, 8) == 0
        assert 59 < await there.take("k", 10, 60, 3) <= 60
        assert await there.take("other", 10, 60, 3) == 0
        here.give_back("k", 5)
        await asyncio.sleep(0.1)
        assert await there.take("k", 10, 60, 7) == 0
        assert 58 < await here.take("k", 10, 60, 1) <= 60
        assert await here.take("brief", 1, 1, 1) == 0
        wait = await here.take("brief", 1, 1, 1)
        assert 0 < wait <= 1
        await asyncio.sleep(wait + 0.05)
        assert await here.take("brief", 1, 1, 1) == 0
        await mine.aclose()
        await theirs.aclose()
