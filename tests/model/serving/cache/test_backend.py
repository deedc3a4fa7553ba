"""The memory before a real engine: what is told again is what was written, and the engine does not notice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from model.generation import Chunk, Completion, GenerationRequest, SamplingParams, merge_chunks
from model.serving.backend import LocalBackend, Stream
from model.serving.cache.backend import CachedStream, CachingBackend, Subscriber, cached_backend
from model.serving.cache.store import LRUCache, ResponseCache
from tests.demo.scripted import ScriptedBackend
from tests.model.fake_runtime import FakeRuntime
from tests.model.serving.cache.tapes import LENGTH, Tapes
from tests.model.serving.http.serving import paced


def stories() -> ResponseCache:
    return ResponseCache(LRUCache(1_000_000, 1000), 1000)


@pytest.fixture
async def desk() -> AsyncIterator[tuple[CachingBackend, LocalBackend, FakeRuntime]]:
    local, network = paced(slots=2, queue=0, end_bias=-3.0)
    backend = cached_backend(local, stories())
    assert isinstance(backend, CachingBackend)
    async with backend.running():
        yield backend, local, network


async def hear(stream: Stream) -> tuple[list[Chunk], Completion]:
    return [chunk async for chunk in stream], stream.completion


def story(seed: int = 1, **more: object) -> GenerationRequest:
    sampling = SamplingParams(seed=seed, temperature=0.9)
    return GenerationRequest(prompt="Once upon", max_tokens=60, sampling=sampling, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("logprobs", [None, 2])
async def test_a_story_told_again_is_the_story_that_was_written(
    desk: tuple[CachingBackend, LocalBackend, FakeRuntime], logprobs: int | None
) -> None:
    backend, local, _ = desk
    alone, plain = await hear(await local.submit(story(logprobs=logprobs)))
    first = await backend.submit(story(logprobs=logprobs))
    written, one = await hear(first)
    steps = local.engine.stats().steps
    again = await backend.submit(story(logprobs=logprobs))
    replayed, two = await hear(again)
    assert isinstance(first, Subscriber)
    assert isinstance(again, CachedStream)
    assert local.engine.stats().steps == steps, "the engine had nothing to do"
    assert merge_chunks(written) == merge_chunks(alone) == merge_chunks(replayed)
    assert len(replayed) > 1, "chunk by chunk, not in one; on a busy machine they are longer"
    for completion in (one, two):
        assert (completion.text, completion.finish_reason, completion.logprobs) == (
            plain.text,
            plain.finish_reason,
            plain.logprobs,
        )
        assert completion.usage.prompt_tokens == plain.usage.prompt_tokens
        assert completion.usage.completion_tokens == plain.usage.completion_tokens
    assert two.usage.ttft < 0.05
    assert (first.served_by, again.served_by) == ("local", "cache")
    assert dict(backend.cache.requests) == {"miss": 1, "hit": 1}


async def test_what_is_not_to_be_remembered_is_written_each_time(
    desk: tuple[CachingBackend, LocalBackend, FakeRuntime],
) -> None:
    backend, local, _ = desk
    for _ in range(2):
        await hear(await backend.submit(story(cacheable=False)))
    assert sum(local.engine.stats().finished.values()) == 2
    assert len(backend.cache.memory) == 0
    assert backend.cache.requests == {"bypassed": 2}


async def test_ten_equal_requests_at_once_take_one_slot_and_stream_along(
    desk: tuple[CachingBackend, LocalBackend, FakeRuntime],
) -> None:
    backend, local, network = desk
    network.step_seconds = 0.002
    first = await backend.submit(story())
    head = [await anext(aiter(first)) for _ in range(3)]  # three chunks of the same iteration
    others = [await backend.submit(story()) for _ in range(9)]
    starts = [await anext(aiter(other)) for other in others]
    assert local.engine.stats().active == 1
    assert not any(local.engine.stats().finished.values()), "they hear of it while it is being written"
    assert all(start.text.startswith(merge_chunks(head).text) for start in starts)
    for stream in (first, *others):
        stream.cancel()
    await asyncio.sleep(0.05)
    assert local.engine.stats().active == 0
    assert len(backend.cache.memory) == 0


async def test_when_the_one_who_asked_first_leaves_the_others_hear_the_end(
    desk: tuple[CachingBackend, LocalBackend, FakeRuntime],
) -> None:
    backend, local, network = desk
    whole, _ = await hear(await local.submit(story()))
    network.step_seconds = 0.002
    first = await backend.submit(story())
    await anext(aiter(first))
    second = await backend.submit(story())
    first.cancel()
    chunks, completion = await hear(second)
    assert merge_chunks(chunks) == merge_chunks(whole)
    assert completion.usage.completion_tokens == len(merge_chunks(whole).tokens)
    assert isinstance(await backend.submit(story()), CachedStream)


async def test_when_all_leave_the_slot_is_free_at_the_next_step(
    desk: tuple[CachingBackend, LocalBackend, FakeRuntime],
) -> None:
    backend, local, network = desk
    network.step_seconds = 0.01
    streams = [await backend.submit(story()) for _ in range(3)]
    await anext(aiter(streams[0]))
    for stream in streams[1:]:
        stream.cancel()
    await asyncio.sleep(0)
    assert local.engine.stats().active == 1
    streams[0].cancel()
    _, completion = await hear(streams[0])
    assert completion.finish_reason == "cancelled"
    assert completion.usage.prompt_tokens > 0, "the last to leave still hears the engine's own counts"
    assert local.engine.stats().active == 0


async def test_a_story_that_failed_is_written_again(
    desk: tuple[CachingBackend, LocalBackend, FakeRuntime],
) -> None:
    backend, _, network = desk
    network.fail_next = RuntimeError("the pen broke")
    _, failed = await hear(await backend.submit(story()))
    _, fine = await hear(await backend.submit(story()))
    assert (failed.finish_reason, fine.finish_reason) in [("error", "stop"), ("error", "length")]


async def test_what_was_written_by_another_version_than_expected_is_kept_under_its_own_name() -> None:
    tapes = Tapes()
    backend = CachingBackend(tapes, stories())
    asked = GenerationRequest(prompt="Once", sampling=SamplingParams(seed=1))
    stream = await backend.submit(asked)
    tapes.streams[0].fingerprint = "green"  # the switch came between the question and the story
    tapes.streams[0].play(LENGTH)
    await hear(stream)
    assert not isinstance(await backend.submit(asked), CachedStream)
    tapes.now = "green"
    assert isinstance(await backend.submit(asked), CachedStream)


async def test_while_a_backend_does_not_know_who_would_write_it_is_asked_each_time() -> None:
    tapes = Tapes()
    backend = CachingBackend(tapes, stories())
    asked = GenerationRequest(prompt="Once")
    tapes.now = None  # type: ignore[assignment]
    told = [await backend.submit(asked) for _ in range(2)]
    assert len(tapes.streams) == 2
    for tape, name in zip(tapes.streams, ("blue", None), strict=True):
        tape.fingerprint = name  # type: ignore[assignment]  # what it turned out to be, if that is known
        tape.play(LENGTH)
    for stream in told:
        await hear(stream)
    tapes.now = "blue"
    assert isinstance(await backend.submit(asked), CachedStream)
    assert len(backend.cache.memory) == 1


def test_a_backend_that_knows_nothing_of_editions_is_left_alone() -> None:
    backend: Any = ScriptedBackend("a story")
    assert cached_backend(backend, stories()) is backend


async def test_the_memory_ends_with_its_backend_and_breaks_off_what_is_being_told() -> None:
    local, network = paced(slots=2, step_seconds=0.01)
    backend = cached_backend(local, stories())
    async with backend.running():
        stream = await backend.submit(story())
        await anext(aiter(stream))
    _, completion = await hear(stream)
    assert completion.finish_reason == "cancelled"
    assert network.calls
