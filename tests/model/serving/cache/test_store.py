"""Cached responses: their key, their stored form, eviction, and the Redis that replicas share."""

from __future__ import annotations

import tracemalloc
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.generation import Chunk, GenerationRequest, SamplingParams, TokenLogprob
from model.serving.cache import OVERHEAD, PREFIX, CachedResponse, LRUCache, ResponseCache, cache_key
from model.serving.redis import RedisLink
from model.wishes import Wishes
from tests.redis_server import redis_server, settled

RESPONSE = CachedResponse((Chunk("Once", (1,)), Chunk(" upon", (2,))), "stop", 3, 2)


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
        first.put("k", RESPONSE)
        await settled(links[0])
        assert await second.get("k") == RESPONSE
        assert 0 < await links[0].client.ttl(PREFIX + "k") <= 60
        await links[0].client.set(PREFIX + "spoilt", b'["stop",')
        assert await second.get("spoilt") is None
        server.stop()
        assert await second.get("k") == RESPONSE
        assert await second.get("other") is None
        second.put("other", RESPONSE)
        assert await second.get("other") == RESPONSE
        for link in links:
            await link.aclose()


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=8)
TOKENS = st.integers(0, 2**31)
LOGPROBS = st.builds(
    TokenLogprob, TOKENS, TEXTS, NUMBERS, st.lists(st.tuples(TOKENS, TEXTS, NUMBERS), max_size=3).map(tuple)
)
PIECES = st.builds(Chunk, TEXTS, st.lists(TOKENS, max_size=3).map(tuple), st.lists(LOGPROBS, max_size=2).map(tuple))
STORIES = st.builds(
    CachedResponse, st.lists(PIECES, max_size=5).map(tuple), st.sampled_from(["stop", "length"]), TOKENS, TOKENS
)

REQUEST = GenerationRequest(
    prompt="Once", max_tokens=50, sampling=SamplingParams(temperature=0.8, seed=3), stop=("End",)
)


@given(STORIES)
def test_a_story_comes_back_to_the_last_bit(response: CachedResponse) -> None:
    assert CachedResponse.from_bytes(response.as_bytes()) == response


@given(st.binary(max_size=60) | st.builds(lambda response, cut: response.as_bytes()[:cut], STORIES, st.integers(0, 40)))
def test_what_is_no_story_is_none(data: bytes) -> None:
    response = CachedResponse.from_bytes(data)
    assert response is None or response.as_bytes()


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"7", b'["cancelled",1,1,[]]', b'["stop","1",1,[]]', b'["stop",1,1,[[1,[]]]]']
)
def test_what_another_hand_has_put_there_is_none(data: bytes) -> None:
    assert CachedResponse.from_bytes(data) is None


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, prompt="Once "),
        replace(REQUEST, max_tokens=51),
        replace(REQUEST, stop=()),
        replace(REQUEST, logprobs=0),
        replace(REQUEST, sampling=replace(REQUEST.sampling, temperature=0.7)),
        replace(REQUEST, sampling=replace(REQUEST.sampling, seed=4)),
        replace(REQUEST, sampling=replace(REQUEST.sampling, top_k=5)),
        replace(REQUEST, sampling=replace(REQUEST.sampling, top_p=0.9)),
        replace(REQUEST, sampling=replace(REQUEST.sampling, min_p=0.1)),
        replace(REQUEST, sampling=replace(REQUEST.sampling, repetition_penalty=1.1)),
        replace(REQUEST, sampling=replace(REQUEST.sampling, presence_penalty=0.5)),
        replace(REQUEST, sampling=replace(REQUEST.sampling, frequency_penalty=0.5)),
        replace(REQUEST, sampling=replace(REQUEST.sampling, logit_bias=((5, 1.0),))),
        replace(REQUEST, sampling=replace(REQUEST.sampling, ignore_eos=True)),
        replace(REQUEST, sampling=replace(REQUEST.sampling, keep_names=False)),
        replace(REQUEST, sampling=replace(REQUEST.sampling, min_tokens=5)),
        replace(REQUEST, prompt=(5, 6)),
        *(replace(REQUEST, wishes=wish) for wish in (Wishes(words=("fox",)), Wishes(length="short"))),
        *(replace(REQUEST, wishes=wish) for wish in (Wishes(dialogue=False), Wishes(ending="sad"))),
    ],
)
def test_every_field_that_changes_a_story_changes_its_key(other: GenerationRequest) -> None:
    assert cache_key("blue", other) != cache_key("blue", REQUEST)


def test_every_field_of_a_request_is_in_the_key_or_is_known_not_to_matter() -> None:
    known = {field.name for field in (*fields(GenerationRequest), *fields(SamplingParams))}
    tested = {"prompt", "max_tokens", "stop", "logprobs", "sampling", "temperature", "seed", "top_k", "top_p"}
    tested |= {"min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"}
    tested |= {"ignore_eos", "min_tokens", "keep_names", "wishes"}
    bypassing = {"echo", "prompt_logprobs"}
    assert known == tested | bypassing | {"cacheable", "user", "variant", "story_id"}


def test_each_fingerprint_has_keys_of_its_own() -> None:
    assert cache_key("blue", REQUEST) != cache_key("green", REQUEST)


def test_a_greedy_story_is_the_same_for_every_seed_and_0_is_0() -> None:
    keys = {
        cache_key("blue", GenerationRequest(prompt="Once", sampling=SamplingParams(temperature=temperature, seed=seed)))
        for temperature in (0, 0.0)
        for seed in (1, 2)
    }
    assert len(keys) == 1
