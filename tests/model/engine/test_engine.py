"""The engine writes many streams, and each as if it were alone."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.engine.scheduler import PREFIXES
from model.engine.stream import Stream
from model.engine.title import title_of
from model.errors import BusyError, StoryError
from tests.model.engines import (
    CHUNK,
    LONG,
    NO_END,
    TOKENIZER,
    by_hand,
    engine,
    outcome,
    request,
    runtime,
    until,
    whole_text,
)
from tests.model.fake_runtime import FakeRuntime

# One story


@pytest.mark.parametrize("prompt", ["", "Once upon a time ", "Grüß 🦊", LONG])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_story_is_what_the_runtime_gives_by_hand(prompt: str, temperature: float) -> None:
    asked = request(prompt, temperature=temperature, seed=7)
    with engine() as e:
        stream = e.submit(asked)
        chunks = list(stream)
    assert outcome(stream.completion, stream.tokens) == by_hand(asked)
    assert "".join(chunk.text for chunk in chunks) == stream.completion.text
    assert [token for chunk in chunks for token in chunk.tokens] == list(stream.tokens)
    assert stream.completion.usage.prompt_tokens == len(TOKENIZER.encode(prompt))
    assert stream.completion.usage.completion_tokens == len(stream.tokens)


async def test_with_and_without_an_event_loop_the_story_is_the_same() -> None:
    asked = request(seed=3)
    async with engine() as e:
        stream = e.submit(asked)
        text = "".join([chunk.text async for chunk in stream])
        other = await asyncio.to_thread(lambda: "".join(chunk.text for chunk in e.submit(asked)))
    assert text == other == stream.completion.text == by_hand(asked)[1]


@pytest.mark.parametrize("seed", range(8))
def test_a_stop_string_ends_the_story_and_stays_out_of_it(seed: int) -> None:
    free = by_hand(request(seed=seed, max_tokens=60), runtime(**NO_END))[1]
    stop = (free[20:23], "never there")
    asked = request(seed=seed, max_tokens=60, stop=stop)
    with engine(runtime(**NO_END)) as e:
        stream = e.submit(asked)
        text = "".join(chunk.text for chunk in stream)
    assert text == stream.completion.text == free[: free.index(stop[0])]
    assert stream.completion.finish_reason == "stop"
    assert outcome(stream.completion, stream.tokens) == by_hand(asked, runtime(**NO_END))


def test_a_story_that_ends_itself_has_stopped_and_one_cut_short_has_length() -> None:
    with engine(runtime(end_bias=1000.0)) as e:
        nothing = e.submit(request()).wait(10)
    assert (nothing.text, nothing.finish_reason, nothing.usage.completion_tokens) == ("", "stop", 0)
    with engine(runtime(**NO_END)) as e:
        one = e.submit(request(max_tokens=1)).wait(10)
    assert (one.finish_reason, one.usage.completion_tokens) == ("length", 1)


def test_half_a_character_at_the_end_is_left_out() -> None:
    network = runtime(**NO_END)
    with engine(network) as e:
        for seed in range(40):
            stream = e.submit(request(seed=seed, max_tokens=5))
            assert "".join(chunk.text for chunk in stream) == whole_text(stream.tokens)


def test_a_late_consumer_finds_all_in_one_chunk() -> None:
    with engine(runtime(**NO_END)) as e:
        stream = e.submit(request(max_tokens=30))
        stream.wait(10)
        chunks = list(stream)
    assert len(chunks) == 1
    assert len(chunks[0].tokens) == 30
    assert chunks[0].text == stream.completion.text


def test_log_probabilities_and_alternatives_come_with_the_tokens() -> None:
    with engine() as e:
        stream = e.submit(request(seed=5, max_tokens=12, logprobs=3))
        found = [logprob for chunk in stream for logprob in chunk.logprobs]
        plain = e.submit(request(seed=5, max_tokens=12))
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
        usage = e.submit(request(max_tokens=10)).wait(10).usage
    assert 0 <= usage.queued <= usage.ttft < usage.duration
    assert 0 < usage.tokens_per_second < 1000


def test_the_completion_of_a_story_in_the_making_is_refused(gated: FakeRuntime) -> None:
    with engine(gated) as e:
        gated.gate.clear()
        stream = e.submit(request())
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
    st.tuples(st.sampled_from(["submit", "submit", "cancel", "drop", "read"]), st.integers(0, 99)), max_size=40
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(OPERATIONS, st.integers(1, 4))
def test_whatever_consumers_do_every_story_is_its_own_and_every_slot_comes_back(
    operations: list[tuple[str, int]], slots: int
) -> None:
    gc.freeze()  # what other tests imported need not be searched each time
    with engine(slots=slots) as e:
        streams: list[Stream] = []
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
        while streams:
            last = streams.pop()
            last.wait(30)
            tokens, text, reason = by_hand(last.request)
            if last.completion.finish_reason == "cancelled":
                assert tokens[: len(last.tokens)] == list(last.tokens)
            else:
                assert outcome(last.completion, last.tokens) == (tokens, text, reason)
        gc.collect()
        gc.unfreeze()
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
        decoding = e.submit(request(max_tokens=4000))
        until(lambda: len(decoding.tokens) > 2)
        gated.gate.clear()
        long = e.submit(request(LONG * 3, max_tokens=5))
        short = e.submit(request("Once", max_tokens=1))
        start = len(gated.calls)
        gated.gate.set()
        short.wait(10)
        long.wait(10)
        calls = gated.calls[start:]
        decoding.cancel()
    chunks = [size for kind, size in calls if kind == "prefill"]
    assert max(chunks) <= CHUNK
    assert len(chunks) > 20
    length = 1 + len(TOKENIZER.encode("Once"))
    assert length < CHUNK
    assert length in chunks[:3], "the short one did not wait for the long one's end"
    read = 0
    for kind, size in calls:  # between two steps, at most a chunk and what overlaps it
        read = 0 if kind == "step" else read + size
        assert read < 2 * CHUNK


@given(
    prompts=st.lists(
        st.builds(lambda cut, rest: LONG[:cut] + rest, st.integers(0, 200), st.sampled_from(["", "x", "Grüß"])),
        min_size=1,
        max_size=6,
    ),
    repeats=st.integers(1, 2),
)
def test_what_prompts_begin_with_alike_is_read_once_and_changes_no_story(prompts: list[str], repeats: int) -> None:
    network = runtime()
    asked = [request(prompt, seed=seed, max_tokens=5) for seed, prompt in enumerate(prompts * repeats)]
    with engine(network) as e:
        streams = [e.submit(each) for each in asked]
        for each, stream in zip(asked, streams, strict=True):
            stream.wait(30)
            assert outcome(stream.completion, stream.tokens) == by_hand(each)
        stats = e.stats()
    stories = [(0, *TOKENIZER.encode(title_of(prompt) + prompt)) for prompt in prompts]
    starts = {story[: min(end, len(story))] for story in stories for end in range(CHUNK, len(story) + CHUNK, CHUNK)}
    sizes = [(len(start) - 1) % CHUNK + 1 for start in starts]
    assert stats.prompt_tokens == sum(size for kind, size in network.calls if kind == "prefill") == sum(sizes)
    assert stats.prompt_tokens + stats.cached_prompt_tokens == repeats * sum(map(len, stories))


def test_old_prefixes_are_forgotten() -> None:
    network = runtime()
    with engine(network) as e:
        for number in [*range(PREFIXES + 1), PREFIXES, 0]:
            e.submit(request(f"{number}", max_tokens=1)).wait(10)
    assert len([kind for kind, _ in network.calls if kind == "prefill"]) == PREFIXES + 2


def test_when_the_stream_that_reads_a_shared_prompt_is_cancelled_the_others_read_it(gated: FakeRuntime) -> None:
    with engine(gated) as e:
        decoding = e.submit(request(max_tokens=4000))
        until(lambda: len(decoding.tokens) > 2)
        gated.gate.clear()
        first, second = (e.submit(request(LONG, seed=seed, max_tokens=5)) for seed in (0, 1))
        gated.gate.set()
        until(lambda: any(kind == "prefill" and size == CHUNK for kind, size in gated.calls))
        first.cancel()
        second.wait(30)
        decoding.cancel()
    assert outcome(second.completion, second.tokens) == by_hand(request(LONG, seed=1, max_tokens=5), runtime(**NO_END))


def test_slots_are_given_in_order_of_arrival_and_the_queue_is_bounded(gated: FakeRuntime) -> None:
    prompts = ["", "xxx", "x", "xxxx"]  # known by how many tokens are read: 1, 4, 2, 5
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
        streams = [e.submit(request(seed=seed)) for seed in range(5)]
        for stream in streams:
            list(stream)
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
        return sum([len(chunk.tokens) async for chunk in stream])

    async with engine(network) as e:
        loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
        tokens = await asyncio.gather(*[read(e.submit(request(seed=seed, max_tokens=50))) for seed in range(8)])
        loop.call_soon_threadsafe = original  # type: ignore[method-assign]
    assert tokens == [50] * 8
    assert 0 < calls <= len(network.calls)  # one for a step, one for the prompts read before it
