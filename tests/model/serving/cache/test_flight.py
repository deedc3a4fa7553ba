"""One story, many readers: whatever they do and in whatever order, nobody is told anything else."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.errors import StoryError
from model.generation import Chunk, Completion, GenerationRequest, SamplingParams
from model.serving.backend import Stream
from model.serving.cache.backend import CachedStream, CachingBackend
from model.serving.cache.store import LRUCache, ResponseCache
from tests.model.serving.cache.tapes import LENGTH, Tape, Tapes, words


@dataclass
class Listener:
    """A reader with a task that reads, and what it knows."""

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
    def story(self) -> str:
        return "".join(words(self.fingerprint, self.request))

    @property
    def done(self) -> bool:
        return self.task is not None and self.task.done()

    @property
    def completion(self) -> Completion:
        return self.stream.completion


class Readers(RuleBasedStateMachine):
    """Readers come, leave and are told; stories go on, end, fail, and the version behind them changes."""

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
        running = [
            each for each in self.sources(fingerprint, request) if not each.over and not each.cancelled
        ]
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
        else:  # as where the reader's own task ends
            assert listener.task is not None
            listener.task.cancel()
            self.settle()
            self.listeners.remove(listener)
            source = listener.source
            del listener.stream, listener
            gc.collect()
            self.settle()
            assert source is not None
            assert source.cancelled == (
                not any(each.source is source and not each.left for each in self.listeners)
            )
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
    def nobody_is_told_anything_but_the_story_of_the_version_that_was_asked(self) -> None:
        for each in self.listeners:
            assert each.story.startswith(each.text)

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
    def a_story_is_stopped_exactly_when_its_last_reader_has_left(self) -> None:
        for tape in self.tapes.streams:
            stay = any(each.source is tape and not each.left for each in self.listeners)
            if not tape.over:
                assert not tape.cancelled
                assert stay

    @invariant()
    def every_end_is_told_with_its_counts(self) -> None:
        for each in self.listeners:
            if not each.done or each.error is not None:
                continue
            told = each.completion
            assert told.text == each.text
            assert told.usage.completion_tokens == sum(len(chunk.tokens) for chunk in each.heard)
            if each.source is None:
                assert (told.finish_reason in ("stop", "length"), told.usage.prompt_tokens) == (True, 7)
            elif each.left and not each.source.over:
                assert told.finish_reason == "cancelled"

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            for each in self.listeners:
                each.stream.cancel()
            self.settle()
            self.loop.close()


TestReaders = Readers.TestCase
TestReaders.settings = hypothesis.settings(max_examples=25, stateful_step_count=20)


async def test_a_reader_who_gives_up_before_the_story_began_leaves_it_to_the_others() -> None:
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


async def test_a_full_line_is_told_to_all_who_wait_for_the_same_story() -> None:
    tapes = Tapes()
    backend = CachingBackend(tapes, ResponseCache(LRUCache(1_000_000, 1000), 1000))
    tapes.refuse = StoryError("the queue is full")
    answers = await asyncio.gather(
        *(backend.submit(GenerationRequest(prompt="Once")) for _ in range(2)), return_exceptions=True
    )
    assert answers == [tapes.refuse] * 2
    tapes.refuse = None
    assert isinstance((await backend.submit(GenerationRequest(prompt="Once"))).served_by, str)
