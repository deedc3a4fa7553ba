"""The engine over a small real recurrent network: many streams, and each as if it were alone.

The stories are compared with `by_hand`, which drives the runtime for one stream without any engine.
"""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.engine import Engine
from model.errors import BusyError, InputError, ModelError, StoryError
from model.generation import Completion, Request, Sampling
from model.sampling import SamplingRows
from model.snapshot import KeptStates
from model.stream import Stream
from model.tokenizer import StoryTokenizer
from tests.model.fake_runtime import FakeRuntime
from training.bpe import train_tokenizer

SENTENCES = [
    "Once upon a time there was a little fox who lived under the old oak tree.",
    "„Grüß dich“, sagte der Bär, „möchtest du süße Äpfel?“ 🦊 and 🐻 shared 🍎🍎🍎 under the 🌳.",
]
TOKENIZER = StoryTokenizer(train_tokenizer(SENTENCES * 20, vocab_size=400))
CHUNK = 16
LONG = "Once upon a time there was a little fox. " * 20
NO_END = {"end_bias": -1000.0}


def runtime(**options: float) -> FakeRuntime:
    return FakeRuntime(TOKENIZER.vocab_size, **options)  # type: ignore[arg-type]


def engine(network: FakeRuntime | None = None, **options: int) -> Engine:
    return Engine(network or runtime(), TOKENIZER, **{"prefill_chunk": CHUNK} | options)  # type: ignore[arg-type]


def request(prompt: str = "Once upon", *, seed: int = 0, max_tokens: int = 30, **options: object) -> Request:
    sampling = Sampling(seed=seed, temperature=options.pop("temperature", 0.9), repetition_penalty=1.1)  # type: ignore[arg-type]
    return Request(prompt=prompt, max_tokens=max_tokens, sampling=sampling, **options)  # type: ignore[arg-type]


def by_hand(asked: Request, network: FakeRuntime | None = None) -> tuple[list[int], str, str]:
    """(tokens, text, finish reason) of one stream, without an engine."""
    network = network or runtime()
    story = [0, *TOKENIZER.encode(asked.prompt)]
    rows = SamplingRows(1, TOKENIZER.vocab_size)
    rows.set(0, asked.sampling, story[1:])
    state, logits = None, np.empty(0)
    for start in range(0, len(story), CHUNK):
        logits, state = network.prefill(story[start : start + CHUNK], state)
    batch = network.new_batch()
    batch.append(state)
    written: list[int] = []
    reason = "length"
    while len(written) < asked.max_tokens:
        token = int(rows.sample(logits.reshape(1, -1), np.array([len(story)]))[0][0])
        if token == 0:
            reason = "stop"
            break
        story.append(token)
        written.append(token)
        rows.note(0, token)
        text = TOKENIZER.decode(written)
        found = [(text.find(word) + len(word), -len(word)) for word in asked.stop if word in text]
        if found:  # the one that is complete first, and of several the longest
            return written, text[: sum(min(found))], "stop"
        logits = network.step(np.array([token]), batch)
    return written, TOKENIZER.decode(written), reason


def outcome(completion: Completion, tokens: tuple[int, ...]) -> tuple[list[int], str, str]:
    return list(tokens), completion.text, completion.finish_reason


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)


@pytest.fixture
def gated() -> Iterator[FakeRuntime]:
    """A network whose steps wait while its gate is closed; opened again whatever happens."""
    network = runtime(**NO_END)
    yield network
    network.gate.set()


# One story


@pytest.mark.parametrize("prompt", ["", "Once upon a time ", "Grüß 🦊", LONG])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_story_is_what_the_runtime_gives_by_hand(prompt: str, temperature: float) -> None:
    asked = request(prompt, temperature=temperature, seed=7)
    with engine() as e:
        stream = e.write(asked)
        pieces = list(stream)
    assert outcome(stream.completion, stream.tokens) == by_hand(asked)
    assert "".join(piece.text for piece in pieces) == stream.completion.text
    assert [token for piece in pieces for token in piece.tokens] == list(stream.tokens)
    assert stream.completion.usage.prompt_tokens == len(TOKENIZER.encode(prompt))
    assert stream.completion.usage.completion_tokens == len(stream.tokens)


async def test_with_and_without_an_event_loop_the_story_is_the_same() -> None:
    asked = request(seed=3)
    async with engine() as e:
        stream = e.submit(asked)
        text = "".join([piece.text async for piece in stream])
        other = await asyncio.to_thread(lambda: "".join(piece.text for piece in e.write(asked)))
    assert text == other == stream.completion.text == by_hand(asked)[1]


@pytest.mark.parametrize("seed", range(8))
def test_a_stop_string_ends_the_story_and_stays_out_of_it(seed: int) -> None:
    free = by_hand(request(seed=seed, max_tokens=60), runtime(**NO_END))[1]
    stop = (free[20:23], "never there")
    asked = request(seed=seed, max_tokens=60, stop=stop)
    with engine(runtime(**NO_END)) as e:
        stream = e.write(asked)
        text = "".join(piece.text for piece in stream)
    assert text == stream.completion.text == free[: free.index(stop[0])]
    assert stream.completion.finish_reason == "stop"
    assert outcome(stream.completion, stream.tokens) == by_hand(asked, runtime(**NO_END))


def test_a_story_that_ends_itself_has_stopped_and_one_cut_short_has_length() -> None:
    with engine(runtime(end_bias=1000.0)) as e:
        nothing = e.write(request()).wait(10)
    assert (nothing.text, nothing.finish_reason, nothing.usage.completion_tokens) == ("", "stop", 0)
    with engine(runtime(**NO_END)) as e:
        one = e.write(request(max_tokens=1)).wait(10)
    assert (one.finish_reason, one.usage.completion_tokens) == ("length", 1)


def test_half_a_character_at_the_end_is_replaced_and_not_lost() -> None:
    network = runtime(**NO_END)
    with engine(network) as e:
        for seed in range(40):
            stream = e.write(request(seed=seed, max_tokens=5))
            assert "".join(piece.text for piece in stream) == TOKENIZER.decode(stream.tokens)


def test_a_late_reader_finds_all_in_one_piece() -> None:
    with engine(runtime(**NO_END)) as e:
        stream = e.write(request(max_tokens=30))
        stream.wait(10)
        pieces = list(stream)
    assert len(pieces) == 1
    assert len(pieces[0].tokens) == 30
    assert pieces[0].text == stream.completion.text


def test_log_probabilities_and_alternatives_come_with_the_tokens() -> None:
    with engine() as e:
        stream = e.write(request(seed=5, max_tokens=12, logprobs=3))
        found = [logprob for piece in stream for logprob in piece.logprobs]
        plain = e.write(request(seed=5, max_tokens=12))
        plain.wait(10)
    assert [each.token for each in found] == list(stream.tokens) == list(plain.tokens)
    assert tuple(found) == stream.completion.logprobs
    assert plain.completion.logprobs == ()
    # By hand: the softmax of the logits after all tokens before.
    network = runtime()
    story = [0, *TOKENIZER.encode("Once upon")]
    logits, state = network.prefill(story)
    batch = network.new_batch()
    batch.append(state)
    for each in found:
        expected = logits.reshape(-1).astype(np.float64)
        expected = expected - np.log(np.exp(expected).sum())
        assert each.logprob == pytest.approx(expected[each.token], abs=1e-6)
        assert [token for token, _, _ in each.alternatives] == np.argsort(-expected)[:3].tolist()
        assert all(text == TOKENIZER.decode([token]) for token, text, _ in each.alternatives)
        logits = network.step(np.array([each.token]), batch)


def test_times_are_in_order() -> None:
    with engine(runtime(step_seconds=0.001, **NO_END)) as e:
        usage = e.write(request(max_tokens=10)).wait(10).usage
    assert 0 <= usage.queued <= usage.ttft < usage.duration
    assert 0 < usage.tokens_per_second < 1000


def test_the_completion_of_a_story_in_the_making_is_refused(gated: FakeRuntime) -> None:
    with engine(gated) as e:
        gated.gate.clear()
        stream = e.write(request())
        with pytest.raises(StoryError, match="still being written"):
            _ = stream.completion
        with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
            stream.wait(0.01)
        gated.gate.set()


# Many stories


@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_the_same_seed_writes_the_same_story_alone_or_among_32_others(noise: int) -> None:
    rng = random.Random(noise)
    asked = request(rng.choice(["", "Grüß", LONG]), seed=rng.randrange(2**63), max_tokens=50)
    with engine(slots=5) as e:
        others: list[Stream] = []
        for index in range(32):
            prompt = LONG[: rng.randrange(300)]
            others.append(e.submit(request(prompt, seed=index, max_tokens=rng.randrange(1, 60))))
            if index == 16:
                stream = e.submit(asked)
            if rng.random() < 0.3:
                rng.choice(others).cancel()
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.005)
        for other in others[::3]:
            other.cancel()
        stream.wait(30)
        for other in others:
            other.wait(30)
    assert outcome(stream.completion, stream.tokens) == by_hand(asked)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["submit", "submit", "cancel", "drop", "fork", "read"]), st.integers(0, 99)),
    max_size=40,
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(OPERATIONS, st.integers(1, 4))
def test_whatever_readers_do_every_story_is_its_own_and_every_slot_comes_back(
    operations: list[tuple[str, int]], slots: int
) -> None:
    with engine(slots=slots) as e:
        streams: list[Stream] = []
        forks: list[tuple[Request, Stream]] = []
        for name, number in operations:
            which = number % max(len(streams), 1)
            if name == "submit":
                asked = request(LONG[: number * 3], seed=number, max_tokens=1 + number % 40)
                streams.append(e.submit(asked))
            elif not streams:
                continue
            elif name == "cancel":
                streams[which].cancel()
            elif name == "drop":
                del streams[which]
            elif name == "read":
                next(streams[which], None)
            elif count := len(streams[which].tokens):
                asked, at = streams[which].request, number % (count + 1)
                if at < asked.max_tokens:
                    rest = request("", seed=asked.sampling.seed, max_tokens=asked.max_tokens - at)
                    forks.append((asked, e.submit(rest, snapshot=streams[which].snapshot(at))))
        for asked, fork in forks:
            assert fork.prompt + fork.wait(30).text == asked.prompt + by_hand(asked)[1]
        while streams:
            last = streams.pop()
            last.wait(30)
            tokens, text, reason = by_hand(last.request)
            if last.completion.finish_reason == "cancelled":
                assert tokens[: len(last.tokens)] == list(last.tokens)
            else:
                assert outcome(last.completion, last.tokens) == (tokens, text, reason)
        gc.collect()
        until(lambda: e.stats().active == e.stats().waiting == 0)
        assert e.stats().healthy
        assert "error" not in e.stats().finished


def test_a_prompt_is_cut_at_the_same_places_whatever_else_is_read(gated: FakeRuntime) -> None:
    asked = request(LONG, seed=11)
    with engine(gated) as e:
        decoding = e.submit(request(max_tokens=200))
        until(lambda: e.stats().active == 1)
        gated.gate.clear()
        before = [e.submit(request("x" * length, seed=length)) for length in (4, 9)]
        stream = e.submit(asked)
        after = [e.submit(request(LONG[:length], seed=length)) for length in (30, 55, 200)]
        gated.gate.set()
        stream.wait(30)
        for other in (decoding, *before, *after):
            other.cancel()
    assert outcome(stream.completion, stream.tokens) == by_hand(asked, runtime(**NO_END))


def test_a_long_prompt_stalls_neither_those_who_decode_nor_a_short_prompt(gated: FakeRuntime) -> None:
    with engine(gated) as e:
        decoding = e.submit(request(max_tokens=1000))
        until(lambda: len(decoding.tokens) > 2)
        gated.gate.clear()
        long = e.submit(request(LONG * 3, max_tokens=5))
        short = e.submit(request("Once", max_tokens=1))
        start = len(gated.calls)
        gated.gate.set()
        short.wait(10)
        assert not long.tokens  # the short one did not wait for the long one's end
        long.wait(10)
        calls = gated.calls[start:]
        decoding.cancel()
    chunks = [size for kind, size in calls if kind == "prefill"]
    assert max(chunks) <= CHUNK
    assert len(chunks) > 20
    read = 0
    for kind, size in calls:  # between two steps, at most a chunk and what overlaps it
        read = 0 if kind == "step" else read + size
        assert read < 2 * CHUNK


def test_slots_are_given_in_order_of_arrival_and_the_queue_is_bounded(gated: FakeRuntime) -> None:
    prompts = ["", "xxx", "x", "xxxx"]  # told apart by how many tokens are read: 1, 4, 2, 5
    with engine(gated, slots=1, queue_limit=3) as e:
        gated.gate.clear()
        streams = [e.submit(request(prompt, max_tokens=3)) for prompt in prompts]
        until(lambda: e.stats().active == 1)
        with pytest.raises(BusyError, match="all 1 slots are taken and 3 stories wait") as busy:
            e.submit(request())
        assert 0 < busy.value.retry_after <= 60
        assert (e.stats().waiting, e.stats().refused) == (3, 1)
        gated.gate.set()
        for stream in streams:
            stream.wait(10)
    assert [size for kind, size in gated.calls if kind == "prefill"] == [1, 4, 2, 5]


def test_a_burst_that_fits_the_slots_needs_no_queue() -> None:
    with engine(slots=4, queue_limit=0) as e:
        streams = [e.submit(request(seed=seed, max_tokens=5)) for seed in range(4)]
        assert all(stream.wait(10).finish_reason in ("stop", "length") for stream in streams)


def test_only_the_engines_own_thread_calls_the_runtime() -> None:
    network = runtime()
    with engine(network) as e:
        streams = [e.write(request(seed=seed)) for seed in range(5)]
        for stream in streams:
            list(stream)
            stream.snapshot()
    assert len(network.threads) == 1
    assert threading.get_ident() not in network.threads


async def test_a_step_wakes_an_event_loop_once_however_many_streams_it_reads() -> None:
    network = runtime(**NO_END)
    loop = asyncio.get_running_loop()
    calls = 0
    original = loop.call_soon_threadsafe

    def counted(*arguments: object, **options: object) -> object:
        nonlocal calls
        if threading.current_thread().name == "story-engine":
            calls += 1
        return original(*arguments, **options)  # type: ignore[arg-type]

    async def read(stream: Stream) -> int:
        return sum([len(piece.tokens) async for piece in stream])

    async with engine(network) as e:
        loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
        tokens = await asyncio.gather(
            *[read(e.submit(request(seed=seed, max_tokens=50))) for seed in range(8)]
        )
        loop.call_soon_threadsafe = original  # type: ignore[method-assign]
    assert tokens == [50] * 8
    assert 0 < calls <= len(network.calls)  # one for a step, one for the prompts read before it


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
        assert first.completion.text == TOKENIZER.decode(first.tokens)


async def test_awaiting_a_cancel_waits_until_the_slot_is_free() -> None:
    async with engine(runtime(**NO_END), slots=1) as e:
        stream = e.submit(request(max_tokens=1000))
        await anext(stream)
        await stream.cancel()
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
        stream = e.write(request(max_tokens=4000))
        next(stream)
        del stream
        until(lambda: e.stats().active == 0)
        assert e.stats().finished == {"cancelled": 1}


async def test_a_reader_that_is_cancelled_or_breaks_off_frees_the_slot() -> None:
    async def read(e: Engine) -> None:
        async with e.submit(request(max_tokens=4000)) as stream:
            async for _ in stream:
                pass

    async with engine(runtime(**NO_END)) as e:
        task = asyncio.create_task(read(e))
        while not e.stats().tokens:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert e.stats().active == 0
        async with e.submit(request(max_tokens=4000)) as stream:
            async for _ in stream:
                break
        assert e.stats().active == 0


def test_readers_whose_event_loop_was_closed_touch_no_other(gated: FakeRuntime) -> None:
    with engine(gated) as e:
        gated.gate.clear()
        stream = e.submit(request(max_tokens=20))

        async def read_the_first_token_and_leave_while_waiting_for_the_second() -> None:
            await anext(stream)
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.01)
            task.cancel()

        asyncio.run(read_the_first_token_and_leave_while_waiting_for_the_second())
        other = e.write(request(seed=1, max_tokens=20))
        gated.gate.set()
        assert sum(len(piece.tokens) for piece in other) == 20
        assert sum(len(piece.tokens) for piece in stream) == 19
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
        assert "".join(piece.text for piece in stream) == broken.text
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
        again = e.write(asked)
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
        second = e.submit(request(seed=1))
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
    assert streams[0].snapshot().tokens[-10:] == streams[0].tokens  # the last state was kept
    with pytest.raises(StoryError, match="the engine is closed"):
        e.submit(request())
    e.close()


def test_a_drain_that_takes_too_long_cancels_the_rest() -> None:
    e = engine(runtime(step_seconds=0.002, **NO_END), slots=1)
    streams = [e.submit(request(max_tokens=4000)) for _ in range(2)]
    e.close(drain=True, timeout=0.05)
    assert [stream.completion.finish_reason for stream in streams] == ["cancelled"] * 2
    assert streams[0].completion.text


async def test_leaving_the_engine_ends_its_stories() -> None:
    async with engine(runtime(**NO_END)) as e:
        stream = e.submit(request(max_tokens=4000))
    assert [piece.text async for piece in stream] or stream.completion.text == ""
    assert stream.completion.finish_reason == "cancelled"


def test_an_engine_nobody_holds_any_more_ends_its_thread() -> None:
    e = engine()
    e.write(request(max_tokens=2)).wait(10)
    thread = e._thread
    del e
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_process_ends_cleanly_in_the_middle_of_a_story(repository: Path) -> None:
    script = """
from tests.model.test_engine import *
stream = engine(runtime(**NO_END)).write(request(max_tokens=4000))
print(next(stream).tokens)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("(")


# Saving and forking


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    at=st.integers(0, 30),
    keep=st.booleans(),
    keep_limit=st.sampled_from([300, 1000, 10**6]),
    seed=st.integers(0, 50),
    prompt=st.sampled_from(["", "Grüß 🦊", LONG[:150]]),
    stop=st.sampled_from([(), ("e", "🦊"), ("er f", " t", "ä")]),
)
def test_a_fork_at_any_token_goes_on_as_the_story_itself_did(
    at: int, keep: bool, keep_limit: int, seed: int, prompt: str, stop: tuple[str, ...]
) -> None:
    with engine(keep_limit=keep_limit) as e:
        asked = request(prompt, seed=seed, max_tokens=30, stop=stop)
        stream = e.submit(asked, keep_states=keep)
        stream.wait(10)
        tokens, text, reason = by_hand(asked)
        at = min(at, len(tokens))
        left = 30 - at
        saved = stream.snapshot(at)
        assert saved.tokens == (*TOKENIZER.encode(prompt), *tokens[:at])
        if not left or (reason == "stop" and at == len(tokens) and stop):
            return
        fork = e.submit(request("", seed=seed, max_tokens=left, stop=stop), snapshot=saved)
        fork.wait(10)
        assert list(fork.tokens) == tokens[at:]
        assert fork.prompt + fork.completion.text == prompt + text
        assert fork.completion.finish_reason == reason
        assert "".join(piece.text for piece in fork) == fork.completion.text


def test_a_story_is_saved_while_it_is_written_and_the_saved_state_is_not_changed(gated: FakeRuntime) -> None:
    asked = request(seed=4, max_tokens=200)
    with engine(gated) as e:
        stream = e.submit(asked)
        until(lambda: len(stream.tokens) > 5)
        saved = stream.snapshot()
        at = len(saved.tokens) - len(TOKENIZER.encode(asked.prompt))
        assert saved.state.position == len(saved.tokens)  # only the last token is still to be fed
        forks = [e.submit(request("", seed=4, max_tokens=200 - at), snapshot=saved) for _ in range(3)]
        other = e.submit(request("", seed=5, max_tokens=50), snapshot=saved)
        stream.wait(10)
        for fork in forks:
            assert saved.prompt + saved.text + fork.wait(10).text == "Once upon" + stream.completion.text
        assert other.wait(10).text != forks[0].completion.text[: len(other.completion.text)]


async def test_a_fork_of_a_fork_still_goes_on_alike() -> None:
    async with engine(runtime(**NO_END)) as e:
        stream = e.submit(request(seed=8, max_tokens=60), keep_states=True)
        whole = await stream.finished()
        first = await stream.snapshot_async(20)
        fork = e.submit(request("", seed=8, max_tokens=40), snapshot=first, keep_states=True)
        await fork.finished()
        for at in (0, 1, 17, 39):
            second = await fork.snapshot_async(at)
            grandchild = e.submit(request("", seed=8, max_tokens=40 - at), snapshot=second)
            assert grandchild.prompt + (await grandchild.finished()).text == "Once upon" + whole.text


def test_kept_states_make_a_fork_cost_no_step_more_than_its_tokens() -> None:
    network = runtime(**NO_END)
    with engine(network) as e:
        for keep, extra in ((True, 0), (False, 20)):
            stream = e.submit(request(max_tokens=40), keep_states=keep)
            stream.wait(10)
            saved = stream.snapshot(21)
            before = len(network.calls)
            e.submit(request("", max_tokens=5), snapshot=saved).wait(10)
            assert len(network.calls) - before == 5 + extra


def test_a_story_is_continued_after_it_reached_its_length() -> None:
    with engine(runtime(**NO_END)) as e:
        first = e.write(request(seed=6, max_tokens=20))
        first.wait(10)
        rest = e.write(request("", seed=6, max_tokens=25), snapshot=first.snapshot())
        rest.wait(10)
    text = by_hand(request(seed=6, max_tokens=45), runtime(**NO_END))[1]
    assert rest.prompt + rest.completion.text == "Once upon" + text


def test_text_added_at_a_fork_is_read_and_does_not_depend_on_which_states_were_kept() -> None:
    with engine(runtime(**NO_END)) as e:
        texts = []
        for keep in (True, False):
            stream = e.submit(request(seed=2, max_tokens=20), keep_states=keep)
            stream.wait(10)
            whole = next(at for at in range(8, 20) if not stream.snapshot(at).tail)
            fork = e.submit(request(" the bear", seed=2, max_tokens=10), snapshot=stream.snapshot(whole))
            fork.wait(10)
            assert fork.prompt == "Once upon" + TOKENIZER.decode(stream.tokens[:whole]) + " the bear"
            texts.append(fork.completion.text)
        assert texts[0] == texts[1]
        plain = e.submit(request("", seed=2, max_tokens=10), snapshot=stream.snapshot(whole)).wait(10)
        assert plain.text != texts[0]


def test_text_cannot_be_added_inside_a_character() -> None:
    with engine(runtime(**NO_END)) as e:
        for seed in range(50):
            stream = e.write(request(seed=seed, max_tokens=1))
            stream.wait(10)
            saved = stream.snapshot()
            if saved.tail:
                with pytest.raises(InputError, match="inside a character"):
                    e.submit(request("the bear"), snapshot=saved)
                return
    pytest.fail("no story of one token ended inside a character")


def test_a_place_that_was_not_written_cannot_be_saved(gated: FakeRuntime) -> None:
    with engine(gated, slots=1) as e:
        stream = e.write(request(max_tokens=3))
        stream.wait(10)
        with pytest.raises(InputError, match="at must be a whole number between 0 and 3, got 4"):
            stream.snapshot(4)
        busy = e.submit(request(max_tokens=1000))
        waiting = e.submit(request())
        with pytest.raises(InputError, match="has not read its prompt yet"):
            waiting.snapshot()
        busy.cancel()


@given(st.integers(1, 200), st.integers(1, 40))
def test_kept_states_stay_within_their_limit_and_near_every_token(count: int, fitting: int) -> None:
    class State:
        def __init__(self, position: int) -> None:
            self.position = position
            self.nbytes = 10

    kept = KeptStates(first=5, limit=10 * fitting)
    for position in range(6, 6 + count):
        if kept.wants(position):
            kept.add(State(position))
        assert kept.nbytes <= 10 * fitting
    assert kept.stride <= max(1, 2 * count / fitting)
    for position in range(6, 6 + count):
        found = kept.latest(position)
        behind = position - (found.position if found else 5)
        assert 0 <= behind < kept.stride
