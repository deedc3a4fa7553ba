"""The client's side of the wire: held against the service's own, and against whatever bytes may come."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.architecture.folder import END_ID
from model.generation import Chunk, Completion, GenerationRequest, PromptEcho, SamplingParams, TokenLogprob, Usage
from model.serving.backend import ModelInfo
from model.serving.http.completions import CompletionFormat
from model.serving.http.response import KEEP_ALIVE
from model.serving.http.schemas import CompletionBody, parse_object
from model.serving.remote.client import RemoteError, WireEvent, body, parse, read_events
from model.wishes import Wishes

words = st.text(st.characters(codec="utf-8"), max_size=8)
numbers = st.floats(-1e6, 0)
tokens = st.lists(st.integers(0, 4095), min_size=1, max_size=5).map(tuple)
biases = st.dictionaries(st.integers(0, 4095), st.floats(-100, 100), max_size=3).map(lambda found: tuple(found.items()))
requests = st.builds(
    GenerationRequest,
    prompt=words | tokens,
    max_tokens=st.integers(1, 4096),
    sampling=st.builds(
        SamplingParams,
        temperature=st.floats(0, 2),
        top_k=st.integers(0, 1000),
        top_p=st.floats(0.01, 1),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(1, 2),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        logit_bias=biases,
        ignore_eos=st.booleans(),
        keep_names=st.booleans(),
        min_tokens=st.integers(0, 1),
        seed=st.integers(0, 2**63 - 1),
    ),
    wishes=st.builds(
        Wishes,
        words=st.lists(st.from_regex(r"[A-Za-z]{1,9}", fullmatch=True), max_size=3).map(tuple),
        length=st.sampled_from([None, "short", "long"]),
        dialogue=st.none() | st.booleans(),
        ending=st.sampled_from([None, "happy", "sad"]),
    ),
    stop=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 5),
)
scoring = st.integers(0, 5).flatmap(
    lambda best: st.builds(
        GenerationRequest,
        prompt=tokens,
        max_tokens=st.just(0),
        logprobs=st.just(best),
        prompt_logprobs=st.just(best),
        echo=st.just(True),
    )
)
entries = st.builds(
    TokenLogprob,
    token=st.integers(0, 4095),
    text=words,
    logprob=numbers,
    alternatives=st.lists(st.tuples(st.integers(0, 4095), words, numbers), max_size=3).map(tuple),
)


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    drawn = draw(st.lists(entries, max_size=3))
    return Chunk(draw(words), tuple(entry.token for entry in drawn), tuple(drawn))


def reading(parts: list[bytes], kind: str = "text/event-stream") -> list[WireEvent] | RemoteError:
    """What comes of an answer whose bytes arrive in these parts; anything else that is raised is a fault."""

    async def content() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    async def read() -> list[WireEvent]:
        response = httpx.Response(200, headers={"content-type": kind}, content=content())
        return [event async for event in read_events(response)]

    try:
        return asyncio.run(read())
    except RemoteError as error:
        return error


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """`data` in parts, cut at these places."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@st.composite
def scored_prompts(draw: st.DrawFn) -> PromptEcho:
    first, *drawn = draw(st.lists(entries, min_size=1, max_size=3))
    every = (first, *drawn)
    ids, texts = tuple(entry.token for entry in every), tuple(entry.text for entry in every)
    return PromptEcho("".join(texts), ids, texts, (None, *drawn))


@given(requests | scoring)
def test_the_service_reads_the_request_that_was_meant(request: GenerationRequest) -> None:
    sent = json.dumps(body(request), ensure_ascii=False).encode()
    read = CompletionBody.read(parse_object(sent))
    assert read.requests() == [request]
    assert (read.stream, read.include_usage, read.return_token_ids) == (True, True, True)


END_OF_STORY = Chunk("", (), (TokenLogprob(END_ID, "", -0.5),))


@given(
    st.lists(chunks(), max_size=5),
    st.none() | scored_prompts(),
    st.sampled_from(["stop", "length"]),
    st.lists(st.integers(0), max_size=6),
)
def test_what_the_service_sends_is_what_is_read_however_the_bytes_are_cut(
    made: list[Chunk], prompt: PromptEcho | None, finish: str, places: list[int]
) -> None:
    if prompt is not None:
        made = [Chunk("", (), prompt=prompt), *made, END_OF_STORY]
    asked = CompletionBody.read({**body(GenerationRequest(prompt="Hi", logprobs=3)), "logprobs": 3})
    answer = CompletionFormat(asked, [GenerationRequest(prompt="Hi")], ModelInfo("a", "b" * 64))
    end = Completion("", finish, Usage(2, 7, 0.25, 0.5, 1.0))  # type: ignore[arg-type]
    sent = b"".join(answer.chunk(0, chunk, 1.5) for chunk in made) + KEEP_ALIVE + answer.ended(0, end)
    read = reading(cut(sent + answer.closing([end], "local"), places))
    assert isinstance(read, list), read.reason
    assert [event.chunk for event in read if event.chunk] == [chunk for chunk in made if chunk != Chunk("", ())]
    assert [event.finish for event in read if event.finish] == [finish]
    assert [event.counts for event in read if event.counts] == [
        {"prompt_tokens": 2, "completion_tokens": 7, "queued": 0.25}
    ]
    assert [event.done for event in read] == [False] * (len(read) - 1) + [True]


junk = st.binary(max_size=60) | st.sampled_from(
    [
        *(b"data: ", b"event: error\n", b"\n\n", b"\r\n", b"[DONE]", b"null", b"[]", b"1e999", b"NaN", b": x\n"),
        *(b'{"choices": [', b"]}", b'{"text": "a", "token_ids": [', b'"logprobs": {"tokens": []', b'{"error": "x"}'),
        *(b'"\\ud800"', b"\xff", b"\xf0\x9f", b'{"error": {"message": 7}}', b"[" * 3000, b'"finish_reason": "stop"'),
    ]
)


@given(st.lists(junk, max_size=12), st.sampled_from(["text/event-stream", "text/event-stream; charset=utf-16", "x/y"]))
def test_whatever_bytes_come_nothing_but_our_own_error_comes_of_them(parts: list[bytes], kind: str) -> None:
    read = reading(parts, kind)
    if isinstance(read, RemoteError):
        assert "\n" not in f"{read}{read.reason}"
        assert len(read.reason) <= 200
    else:
        for event in read:
            assert event.chunk is None or event.chunk.text.encode() is not None


names = ("choices", "text", "token_ids", "logprobs", "tokens", "token_logprobs", "usage", "times", "error", "index")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(names), inner),
    max_leaves=12,
)


@given(st.sampled_from(["", "error", "message"]), json_values)
def test_whatever_json_comes_nothing_but_our_own_error_comes_of_it(name: str, value: object) -> None:
    event = None
    with contextlib.suppress(RemoteError):
        event = parse(name, json.dumps(value))
    assert event is None or event.chunk != Chunk("", ())


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ({"choices": [{"text": 7}]}, "choices.0.text Input should be a valid string"),
        ({"choices": [{"text": "a", "index": 1}]}, "choices.0.index Input should be 0"),
        ({"choices": [{"text": "a", "token_ids": [-1]}]}, "choices.0.token_ids.0 Input should be greater"),
        ({"choices": [{"text": "a", "finish_reason": "tired"}]}, "choices.0.finish_reason Input should be 'stop'"),
        (
            {"choices": [{"text": "a", "token_ids": [1], "logprobs": {"tokens": [], "token_logprobs": []}}]},
            "log-probabilities and tokens of different number",
        ),
        ({"error": {"message": "the pen broke"}}, "the service broke off: the pen broke"),
        ({"error": {}}, "the service broke off: it did not say why"),
    ],
)
def test_an_event_that_does_not_hold_is_reported_with_its_place(event: object, reason: str) -> None:
    with pytest.raises(RemoteError) as caught:
        parse("", json.dumps(event))
    assert reason in caught.value.reason
