"""However a stream ends - stopped, abandoned, failing, closed - its slot is free and no other notices."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from pathlib import Path

import pytest

from model.engine.engine import Engine
from model.errors import ModelError, StoryError
from tests.model.engines import NO_END, TOKENIZER, by_hand, engine, outcome, request, runtime, until, whole_text
from tests.model.fake_runtime import FakeRuntime

# Stopping


def test_a_cancelled_story_frees_its_slot_at_the_next_step(gated: FakeRuntime) -> None:
    with engine(gated, slots=1) as e:
        first = e.submit(request(max_tokens=1000))
        until(lambda: len(first.tokens) > 2)
        gated.gate.clear()
        second = e.submit(request("Grüß", max_tokens=2))
        until(lambda: e.stats().waiting == 1)
        first.cancel()
        start = len(gated.calls)
        gated.gate.set()
        second.wait(10)
        # At most the step that was under way is made for the first story; then the second begins.
        assert [kind for kind, _ in gated.calls[start:]] in (["step", "prefill", "step"], ["prefill", "step"])
        assert first.completion.finish_reason == "cancelled"
        assert first.completion.text == whole_text(first.tokens)


async def test_reading_a_cancelled_story_ends_when_its_slot_is_free() -> None:
    async with engine(runtime(**NO_END), slots=1) as e:
        stream = e.submit(request(max_tokens=1000))
        await anext(stream)
        stream.cancel()
        async for _ in stream:
            pass
        assert stream.completion.finish_reason == "cancelled"
        assert e.stats().active == 0


def test_a_waiting_story_can_be_cancelled_too(gated: FakeRuntime) -> None:
    with engine(gated, slots=1) as e:
        gated.gate.clear()
        first, second = e.submit(request(max_tokens=2)), e.submit(request(max_tokens=2))
        second.cancel()
        gated.gate.set()
        assert second.wait(10).finish_reason == "cancelled"
        assert second.completion.usage.completion_tokens == 0
        assert first.wait(10).finish_reason == "length"


def test_a_story_nobody_holds_any_more_frees_its_slot() -> None:
    with engine(runtime(**NO_END)) as e:
        stream = e.submit(request(max_tokens=4000))
        next(stream)
        del stream
        until(lambda: e.stats().active == 0)
        assert e.stats().finished == {"cancelled": 1}


async def test_a_consumer_that_is_cancelled_or_breaks_off_frees_the_slot() -> None:
    async def read(e: Engine) -> None:
        with e.submit(request(max_tokens=4000)) as stream:
            async for _ in stream:
                pass

    async with engine(runtime(**NO_END)) as e:
        task = asyncio.create_task(read(e))
        while not e.stats().tokens:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(until, lambda: e.stats().active == 0)
        with e.submit(request(max_tokens=4000)) as stream:
            async for _ in stream:
                break
        await asyncio.to_thread(until, lambda: e.stats().active == 0)


def test_consumers_whose_event_loop_was_closed_touch_no_other(gated: FakeRuntime) -> None:
    with engine(gated) as e:
        gated.gate.clear()
        stream = e.submit(request(max_tokens=20))

        async def read_the_first_token_and_leave_while_waiting_for_the_second() -> None:
            await anext(stream)
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.01)
            task.cancel()

        asyncio.run(read_the_first_token_and_leave_while_waiting_for_the_second())
        other = e.submit(request(seed=1, max_tokens=20))
        gated.gate.set()
        assert sum(len(chunk.tokens) for chunk in other) == 20
        assert sum(len(chunk.tokens) for chunk in stream) == 19
        assert e.stats().healthy


# Failing


def test_a_row_of_nan_ends_its_own_story_only() -> None:
    network = runtime(**NO_END)
    poisoned = request(seed=1, max_tokens=60)
    tokens, _, _ = by_hand(poisoned, runtime(**NO_END))
    others = [request(seed=seed, max_tokens=60) for seed in range(2, 6)]
    known = [by_hand(other, runtime(**NO_END)) for other in others]
    network.poison = next(token for token in tokens[5:] if not any(token in story for story, _, _ in known))
    with engine(network) as e:
        stream = e.submit(poisoned)
        streams = [e.submit(other) for other in others]
        broken = stream.wait(10)
        assert broken.finish_reason == "error"
        assert broken.error is not None
        assert "not a number" in broken.error
        assert list(stream.tokens) == tokens[: tokens.index(network.poison) + 1]
        assert "".join(chunk.text for chunk in stream) == broken.text
        for other, expected in zip(streams, known, strict=True):
            other.wait(10)
            assert outcome(other.completion, other.tokens) == expected


def test_a_failing_step_ends_its_streams_and_the_engine_goes_on(gated: FakeRuntime) -> None:
    with engine(gated) as e:
        streams = [e.submit(request(seed=seed, max_tokens=1000)) for seed in range(3)]
        until(lambda: all(stream.tokens for stream in streams))
        gated.gate.clear()
        gated.fail_next = RuntimeError("secret path /home/x")
        gated.gate.set()
        for stream in streams:
            completion = stream.wait(10)
            assert completion.finish_reason == "error"
            assert completion.error == "the model failed (RuntimeError); the story ends here"
        stats = e.stats()
        assert (stats.healthy, stats.active, stats.finished) == (False, 0, {"error": 3})
        assert stats.last_error is not None
        asked = request(seed=9)
        again = e.submit(asked)
        again.wait(10)
        assert outcome(again.completion, again.tokens) == by_hand(asked, runtime(**NO_END))
        assert e.stats().healthy


def test_a_failing_prefill_ends_its_own_story_only(gated: FakeRuntime) -> None:
    with engine(gated) as e:
        first = e.submit(request(max_tokens=40))
        until(lambda: bool(first.tokens))
        gated.gate.clear()
        original = gated.prefill

        def failing(*_: object) -> object:
            gated.prefill = original  # type: ignore[method-assign]
            raise ValueError

        gated.prefill = failing  # type: ignore[method-assign, assignment]
        second = e.submit(request("Another", seed=1))
        gated.gate.set()
        assert second.wait(10).finish_reason == "error"
        assert first.wait(10).finish_reason == "length"


def test_a_tokenizer_larger_than_the_network_is_refused() -> None:
    with pytest.raises(ModelError, match="do not belong together"):
        Engine(FakeRuntime(10), TOKENIZER)
    with pytest.raises(StoryError, match="slots must be between 1 and the runtime's 8, got 9"):
        engine(slots=9)


# Closing


def test_draining_writes_what_waits_and_then_takes_no_more() -> None:
    e = engine(runtime(step_seconds=0.001, **NO_END), slots=2)
    streams = [e.submit(request(seed=seed, max_tokens=10)) for seed in range(6)]
    e.close(drain=True)
    assert [stream.completion.finish_reason for stream in streams] == ["length"] * 6
    with pytest.raises(StoryError, match="the engine is closed"):
        e.submit(request())
    e.close()


def test_a_drain_that_takes_too_long_cancels_the_rest() -> None:
    e = engine(runtime(step_seconds=0.002, **NO_END), slots=1)
    streams = [e.submit(request(max_tokens=4000)) for _ in range(2)]
    until(lambda: len(streams[0].tokens) > 4)  # longer than one character
    e.close(drain=True, timeout=0.05)
    assert [stream.completion.finish_reason for stream in streams] == ["cancelled"] * 2
    assert streams[0].completion.text


async def test_leaving_the_engine_ends_its_stories() -> None:
    async with engine(runtime(**NO_END)) as e:
        stream = e.submit(request(max_tokens=4000))
    assert [chunk.text async for chunk in stream] or stream.completion.text == ""
    assert stream.completion.finish_reason == "cancelled"


def test_an_engine_nobody_holds_any_more_ends_its_thread() -> None:
    e = engine()
    e.submit(request(max_tokens=2)).wait(10)
    thread = e._thread
    del e
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_process_ends_cleanly_in_the_middle_of_a_story(repository: Path) -> None:
    script = """
from tests.model.engine.test_engine import *
stream = engine(runtime(**NO_END)).submit(request(max_tokens=4000))
print(next(stream).tokens)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("(")
