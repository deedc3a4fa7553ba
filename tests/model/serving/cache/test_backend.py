"""The caching backend: hits, coalesced requests, and a model-based test of single flight."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.errors import StoryError
from model.generation import Chunk, Completion, FinishReason, GenerationRequest, SamplingParams, Usage, merge_chunks
from model.serving.backend import Health, LocalBackend, ModelInfo, Stream
from model.serving.cache import CachedStream, CachingBackend, LRUCache, ResponseCache, Subscriber
from model.serving.http.app import SharedState
from tests.demo.scripted import ScriptedBackend
from tests.model.fake_runtime import FakeRuntime
from tests.model.serving.http.serving import paced

LENGTH = 5
"""Words of a story, each one token."""


def words(fingerprint: str, request: GenerationRequest) -> list[str]:
    """The story: its text names backend and request."""
    return [f"{fingerprint}:{request.prompt}:{request.sampling.seed}:{number} " for number in range(LENGTH)]


class Tape:
    """A stream that plays as far as `allowed`."""

    served_by = "tape"

    def __init__(self, fingerprint: str, request: GenerationRequest) -> None:
        self.fingerprint = fingerprint
        self.words = words(fingerprint, request)
        self.allowed = 0
        self.cancelled = False
        self.ending: FinishReason = "stop"
        self.failure: Exception | None = None
        self.news = asyncio.Event()
        self._completion: Completion | None = None

    @property
    def over(self) -> bool:
        return self._completion is not None

    @property
    def completion(self) -> Completion:
        assert self._completion is not None
        return self._completion

    def cancel(self) -> None:
        self.cancelled = True
        self.news.set()

    def play(self, count: int) -> None:
        self.allowed += count
        self.news.set()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        sent: list[str] = []
        finish = self.ending
        for number, word in enumerate(self.words):
            while number >= self.allowed and not self.cancelled and self.failure is None:
                self.news.clear()
                await self.news.wait()
            if self.failure is not None:
                raise self.failure
            if self.cancelled:
                finish = "cancelled"
                break
            sent.append(word)
            yield Chunk(word, (number,))
            finish = self.ending
        usage = Usage(prompt_tokens=7, completion_tokens=len(sent), queued=0.0, ttft=0.1, duration=0.2)
        self._completion = Completion("".join(sent), finish, usage)


class Tapes:
    """The backend. `fingerprint` can change at any time, as when blue is switched to green."""

    name = "tapes"
    capacity = 8
    model = ModelInfo("tapes", "0" * 64)

    def __init__(self) -> None:
        self.now = "blue"
        self.streams: list[Tape] = []
        self.refuse: Exception | None = None
        self.gate = asyncio.Event()  # cleared: a story that begins waits until it is set
        self.gate.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    def health(self) -> Health:
        return Health(True, self.name, "plays", None)

    async def fingerprint(self) -> str | None:
        return self.now

    async def submit(self, request: GenerationRequest) -> Tape:
        await self.gate.wait()
        if self.refuse is not None:
            raise self.refuse
        tape = Tape(self.now, request)
        self.streams.append(tape)
        return tape


def stories() -> ResponseCache:
    return ResponseCache(LRUCache(1_000_000, 1000), 1000)


@pytest.fixture
async def caching() -> AsyncIterator[tuple[CachingBackend, LocalBackend, FakeRuntime]]:
    local, network = paced(slots=2, queue=0, end_bias=-3.0)
    backend = SharedState(cache=stories()).with_cache(local)
    assert isinstance(backend, CachingBackend)
    async with backend.running():
        yield backend, local, network


async def hear(stream: Stream) -> tuple[list[Chunk], Completion]:
    return [chunk async for chunk in stream], stream.completion


def story(seed: int = 1, **more: object) -> GenerationRequest:
    sampling = SamplingParams(seed=seed, temperature=0.9)
    return GenerationRequest(prompt="Once upon", max_tokens=60, sampling=sampling, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("logprobs", [None, 2])
async def test_a_story_asked_again_is_the_story_that_was_written(
    caching: tuple[CachingBackend, LocalBackend, FakeRuntime], logprobs: int | None
) -> None:
    backend, local, _ = caching
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
    assert replayed == first._flight.chunks, "chunk by chunk, as they came"
    for completion in (one, two):
        assert (completion.text, completion.finish_reason, completion.logprobs) == (
            plain.text,
            plain.finish_reason,
            plain.logprobs,
        )
        assert completion.usage.prompt_tokens == plain.usage.prompt_tokens
        assert completion.usage.completion_tokens == plain.usage.completion_tokens
    assert 0 <= two.usage.ttft <= two.usage.duration
    assert (first.served_by, again.served_by) == ("local", "cache")
    assert dict(backend.cache.requests) == {"miss": 1, "hit": 1}


async def test_what_is_not_to_be_remembered_is_written_each_time(
    caching: tuple[CachingBackend, LocalBackend, FakeRuntime],
) -> None:
    backend, local, _ = caching
    for _ in range(2):
        await hear(await backend.submit(story(cacheable=False)))
        await hear(await backend.submit(replace(story(), echo=True)))
        await hear(await backend.submit(replace(story(), prompt_logprobs=1)))
    assert sum(local.engine.stats().finished.values()) == 6
    assert len(backend.cache.memory) == 0
    assert backend.cache.requests == {"bypassed": 6}


async def test_ten_equal_requests_at_once_take_one_slot_and_stream_along(
    caching: tuple[CachingBackend, LocalBackend, FakeRuntime],
) -> None:
    backend, local, network = caching
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
    async with asyncio.timeout(10):
        while local.engine.stats().active:
            await asyncio.sleep(0.005)
    assert len(backend.cache.memory) == 0


async def test_when_the_one_who_asked_first_leaves_the_others_hear_the_end(
    caching: tuple[CachingBackend, LocalBackend, FakeRuntime],
) -> None:
    backend, local, network = caching
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
    caching: tuple[CachingBackend, LocalBackend, FakeRuntime],
) -> None:
    backend, local, network = caching
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


async def test_a_story_that_failed_is_written_again(caching: tuple[CachingBackend, LocalBackend, FakeRuntime]) -> None:
    backend, _, network = caching
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
    joined = [await backend.submit(asked) for _ in range(2)]
    assert len(tapes.streams) == 2
    for tape, name in zip(tapes.streams, ("blue", None), strict=True):
        tape.fingerprint = name  # type: ignore[assignment]  # what it turned out to be, if that is known
        tape.play(LENGTH)
    for stream in joined:
        await hear(stream)
    tapes.now = "blue"
    assert isinstance(await backend.submit(asked), CachedStream)
    assert len(backend.cache.memory) == 1


def test_a_backend_that_knows_nothing_of_fingerprints_is_left_alone() -> None:
    backend: Any = ScriptedBackend("a story")
    assert SharedState(cache=stories()).with_cache(backend) is backend


async def test_the_cache_ends_with_its_backend_and_breaks_off_what_is_running() -> None:
    local, network = paced(slots=2, step_seconds=0.01)
    backend = SharedState(cache=stories()).with_cache(local)
    async with backend.running():
        stream = await backend.submit(story())
        await anext(aiter(stream))
    _, completion = await hear(stream)
    assert completion.finish_reason == "cancelled"
    assert network.calls


@dataclass
class Listener:
    """A client with a task that reads, and what it knows."""

    fingerprint: str
    request: GenerationRequest
    stream: Stream
    source: Tape | None
    heard: list[Chunk] = field(default_factory=list)
    left: bool = False
    task: asyncio.Task[None] | None = None
    error: Exception | None = None

    async def listen(self) -> None:
        try:
            async for chunk in self.stream:
                self.heard.append(chunk)
        except StoryError as error:
            self.error = error

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.heard)

    @property
    def done(self) -> bool:
        return self.task is not None and self.task.done()


class Clients(RuleBasedStateMachine):
    """Clients come, leave and are answered; stories go on, end, fail, and the version behind them changes."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.listeners: list[Listener] = []
        self.whole: set[tuple[str, int]] = set()
        self.loop.run_until_complete(self._open())

    async def _open(self) -> None:
        self.tapes = Tapes()
        self.backend = CachingBackend(self.tapes, ResponseCache(LRUCache(1_000_000, 1000), 1000))

    def settle(self) -> None:
        async def some() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(some())

    @rule(seed=st.integers(0, 1))
    def come(self, seed: int) -> None:
        request = GenerationRequest(prompt="Once", sampling=SamplingParams(seed=seed))
        fingerprint, before = self.tapes.now, len(self.tapes.streams)
        # Followed by somebody, and not yet over: it must not be written a second time.
        running = [each for each in self.sources(fingerprint, request) if not each.over and not each.cancelled]
        stream = self.loop.run_until_complete(self.backend.submit(request))
        new = self.tapes.streams[before:]
        known = (fingerprint, seed) in self.whole
        assert len(new) == (0 if known or running else 1)
        assert isinstance(stream, CachedStream) == known
        source = None if known else (running or new)[0]
        listener = Listener(fingerprint, request, stream, source)
        listener.task = self.loop.create_task(listener.listen())
        self.listeners.append(listener)
        self.settle()

    def sources(self, fingerprint: str, request: GenerationRequest) -> list[Tape]:
        return [each for each in self.tapes.streams if each.words == words(fingerprint, request)]

    @precondition(lambda self: any(not tape.over for tape in self.tapes.streams))
    @rule(data=st.data(), count=st.integers(1, 3))
    def play(self, data: Any, count: int) -> None:
        tape = data.draw(st.sampled_from([each for each in self.tapes.streams if not each.over]))
        tape.play(count)
        self.settle()
        if tape.over and tape.completion.finish_reason in ("stop", "length"):
            self.whole.add((tape.fingerprint, int(tape.words[0].split(":")[2])))

    @precondition(lambda self: any(not each.done for each in self.listeners))
    @rule(data=st.data(), by=st.sampled_from(["cancel", "let go"]))
    def leave(self, data: Any, by: str) -> None:
        listener = data.draw(st.sampled_from([each for each in self.listeners if not each.done]))
        listener.left = True
        if by == "cancel":
            listener.stream.cancel()
        else:  # as where the client's own task ends
            assert listener.task is not None
            listener.task.cancel()
            listener.stream.cancel()
            self.settle()
            self.listeners.remove(listener)
            source = listener.source
            assert source is not None
            assert source.cancelled == (not any(each.source is source and not each.left for each in self.listeners))
        self.settle()

    @precondition(lambda self: any(not tape.over for tape in self.tapes.streams))
    @rule(data=st.data(), how=st.sampled_from(["raise", "error", "cancelled", "length"]))
    def end_badly(self, data: Any, how: Any) -> None:
        tape = data.draw(st.sampled_from([each for each in self.tapes.streams if not each.over]))
        if how == "raise":
            tape.failure = StoryError("the tape tore")
            tape._completion = None
        else:
            tape.ending = how
        tape.play(LENGTH)
        self.settle()
        if how == "raise":
            tape._completion = Completion("", "error", None)  # type: ignore[arg-type]  # it counts as over
        elif how == "length" and not tape.cancelled:
            self.whole.add((tape.fingerprint, int(tape.words[0].split(":")[2])))

    @rule()
    def switch(self) -> None:
        self.tapes.now = "green" if self.tapes.now == "blue" else "blue"

    @invariant()
    def nobody_receives_anything_but_the_story_of_the_version_that_was_asked(self) -> None:
        for each in self.listeners:
            assert "".join(words(each.fingerprint, each.request)).startswith(each.text)

    @invariant()
    def who_stays_hears_all_there_is_and_who_left_hears_no_more(self) -> None:
        for each in self.listeners:
            if each.source is None or each.left:
                assert each.done
                continue
            played = min(each.source.allowed, LENGTH)
            assert each.source.failure is not None or each.text == "".join(each.source.words[:played])
            assert each.done == each.source.over

    @invariant()
    def a_story_is_stopped_exactly_when_its_last_user_has_left(self) -> None:
        for tape in self.tapes.streams:
            stay = any(each.source is tape and not each.left for each in self.listeners)
            if not tape.over:
                assert not tape.cancelled
                assert stay

    @invariant()
    def every_end_has_its_counts(self) -> None:
        for each in self.listeners:
            if not each.done or each.error is not None:
                continue
            completion = each.stream.completion
            assert completion.text == each.text
            assert completion.usage.completion_tokens == sum(len(chunk.tokens) for chunk in each.heard)
            if each.source is None:
                assert (completion.finish_reason in ("stop", "length"), completion.usage.prompt_tokens) == (True, 7)
            elif each.left and not each.source.over:
                assert completion.finish_reason == "cancelled"

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            for each in self.listeners:
                each.stream.cancel()
            self.settle()
            self.loop.close()


TestClients = Clients.TestCase
TestClients.settings = hypothesis.settings(max_examples=25, stateful_step_count=20)


async def test_a_client_who_gives_up_before_the_story_began_leaves_it_to_the_others() -> None:
    tapes = Tapes()
    backend = CachingBackend(tapes, ResponseCache(LRUCache(1_000_000, 1000), 1000))
    request = GenerationRequest(prompt="Once", sampling=SamplingParams(seed=1))
    tapes.gate.clear()
    first, second = (asyncio.create_task(backend.submit(request)) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.01)
    tapes.gate.set()
    stream = await second
    (tape,) = tapes.streams
    tape.play(LENGTH)
    assert "".join([chunk.text async for chunk in stream]) == "".join(tape.words)


async def test_a_story_that_all_gave_up_before_it_began_is_not_begun() -> None:
    tapes = Tapes()
    backend = CachingBackend(tapes, ResponseCache(LRUCache(1_000_000, 1000), 1000))
    tapes.gate.clear()
    task = asyncio.create_task(backend.submit(GenerationRequest(prompt="Once")))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.01)
    tapes.gate.set()
    await asyncio.sleep(0.01)
    assert tapes.streams == []


async def test_a_full_queue_is_raised_for_all_who_wait_for_the_same_story() -> None:
    tapes = Tapes()
    backend = CachingBackend(tapes, ResponseCache(LRUCache(1_000_000, 1000), 1000))
    tapes.refuse = StoryError("the queue is full")
    answers = await asyncio.gather(
        *(backend.submit(GenerationRequest(prompt="Once")) for _ in range(2)), return_exceptions=True
    )
    assert answers == [tapes.refuse] * 2
    tapes.refuse = None
    assert isinstance((await backend.submit(GenerationRequest(prompt="Once"))).served_by, str)
