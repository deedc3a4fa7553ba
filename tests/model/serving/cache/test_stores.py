"""Memory is bounded, and Redis is a second one that may go away."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.generation import Chunk
from model.serving.cache.store import OVERHEAD, PREFIX, CachedResponse, LRUCache, ResponseCache
from model.serving.redis import RedisLink
from tests.redis_server import redis_server, settled

TOLD = CachedResponse((Chunk("Once", (1,)), Chunk(" upon", (2,))), "stop", 3, 2)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "wait"]), st.integers(0, 9), st.integers(0, 900))))
def test_it_is_a_table_that_forgets_the_least_used_and_the_old_and_never_grows_too_large(steps: Any) -> None:
    clock = Clock()
    memory = LRUCache(limit=10_000, ttl=100, clock=clock)
    known: dict[int, tuple[float, bytes]] = {}  # in the order of use
    for what, key, size in steps:
        if what == "wait":
            clock.now += size / 10
        elif what == "put":
            memory.put(str(key), data := bytes(size))
            known.pop(key, None)
            while known and sum(len(old) + OVERHEAD for _, old in known.values()) + size + OVERHEAD > 10_000:
                del known[next(iter(known))]
            known[key] = (clock.now + 100, data)
        else:
            until, data = known.pop(key, (0.0, b""))
            if until > clock.now:
                known[key] = (until, data)
            assert memory.get(str(key)) == (data if until > clock.now else None)
        assert memory.bytes == sum(len(data) + OVERHEAD for _, data in known.values()) <= 10_000
        assert len(memory) == len(known)


def test_one_story_cannot_push_out_all_others() -> None:
    memory = LRUCache(limit=100_000, ttl=100)
    memory.put("small", b"x" * 1000)
    memory.put("huge", b"x" * 50_000)
    assert (memory.get("small"), memory.get("huge")) == (b"x" * 1000, None)


def test_its_bytes_are_what_the_process_gives_for_it() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        memory = LRUCache(limit=1_000_000, ttl=100)
        for number in range(1000):
            memory.put(f"{number:040d}", bytes(500))
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.8 < memory.bytes / grown < 1.25


async def test_replicas_share_stories_through_redis_and_each_remembers_on_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("model.serving.redis.TIMEOUT", 10.0)  # a busy machine's Redis is there too
    with redis_server() as server:
        links = [RedisLink(server.url) for _ in range(2)]
        first, second = (ResponseCache(LRUCache(1_000_000, 60), 60, link) for link in links)
        assert await second.get("k") is None
        first.put("k", TOLD)
        await settled(links[0])
        assert await second.get("k") == TOLD
        assert 0 < await links[0].client.ttl(PREFIX + "k") <= 60
        await links[0].client.set(PREFIX + "spoilt", b'["stop",')
        assert await second.get("spoilt") is None
        server.stop()
        assert await second.get("k") == TOLD
        assert await second.get("other") is None
        second.put("other", TOLD)
        assert await second.get("other") == TOLD
        for link in links:
            await link.aclose()
