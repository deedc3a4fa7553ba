"""What is kept comes back as it was, and a key names all that a story depends on."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.generation import Chunk, GenerationRequest, SamplingParams, TokenLogprob
from model.serving.cache.store import CachedResponse, cache_key

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=8)
TOKENS = st.integers(0, 2**31)
LOGPROBS = st.builds(
    TokenLogprob, TOKENS, TEXTS, NUMBERS, st.lists(st.tuples(TOKENS, TEXTS, NUMBERS), max_size=3).map(tuple)
)
PIECES = st.builds(
    Chunk, TEXTS, st.lists(TOKENS, max_size=3).map(tuple), st.lists(LOGPROBS, max_size=2).map(tuple)
)
STORIES = st.builds(
    CachedResponse,
    st.lists(PIECES, max_size=5).map(tuple),
    st.sampled_from(["stop", "length"]),
    TOKENS,
    TOKENS,
)

REQUEST = GenerationRequest(
    prompt="Once", max_tokens=50, sampling=SamplingParams(temperature=0.8, seed=3), stop=("End",)
)


@given(STORIES)
def test_a_story_comes_back_to_the_last_bit(told: CachedResponse) -> None:
    assert CachedResponse.from_bytes(told.as_bytes()) == told


@given(
    st.binary(max_size=60) | st.builds(lambda told, cut: told.as_bytes()[:cut], STORIES, st.integers(0, 40))
)
def test_what_is_no_story_is_none(data: bytes) -> None:
    told = CachedResponse.from_bytes(data)
    assert told is None or told.as_bytes()


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
    ],
)
def test_every_field_that_changes_a_story_changes_its_key(other: GenerationRequest) -> None:
    assert cache_key("blue", other) != cache_key("blue", REQUEST)


def test_every_field_of_a_request_is_in_the_key_or_is_known_not_to_matter() -> None:
    known = {field.name for field in (*fields(GenerationRequest), *fields(SamplingParams))}
    tested = {"prompt", "max_tokens", "stop", "logprobs", "sampling", "temperature", "seed", "top_k", "top_p"}
    assert known == tested | {"min_p", "repetition_penalty"} | {"cacheable", "user", "story_id"}


def test_each_edition_has_keys_of_its_own() -> None:
    assert cache_key("blue", REQUEST) != cache_key("green", REQUEST)


def test_a_greedy_story_is_the_same_for_every_seed_and_0_is_0() -> None:
    keys = {
        cache_key(
            "blue",
            GenerationRequest(prompt="Once", sampling=SamplingParams(temperature=temperature, seed=seed)),
        )
        for temperature in (0, 0.0)
        for seed in (1, 2)
    }
    assert len(keys) == 1
