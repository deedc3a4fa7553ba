"""Coalescing: nothing is lost, the first chunk is not held back, and closing it closes what is behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.handlers import coalesce
from model.generation import Chunk, TokenLogprob, merge_chunks
from tests import virtual_time


async def stream_of(chunks: list[Chunk], pace: float = 0.0) -> AsyncIterator[Chunk]:
    for chunk in chunks:
        await asyncio.sleep(pace)
        yield chunk


def word(number: int) -> Chunk:
    entry = TokenLogprob(token=number, text=f"w{number} ", logprob=-0.5)
    return Chunk(text=f"w{number} ", tokens=(number,), logprobs=(entry,))


@settings(max_examples=30)
@given(texts=st.lists(st.text(max_size=5), max_size=30), waits=st.lists(st.sampled_from([0.0, 0.003]), max_size=30))
def test_text_tokens_and_log_probabilities_come_through_whole_and_in_order(
    texts: list[str], waits: list[float]
) -> None:
    chunks = [
        Chunk(text=text, tokens=(number,), logprobs=(TokenLogprob(number, text, 0.0),))
        for number, text in enumerate(texts)
    ]

    async def source() -> AsyncIterator[Chunk]:
        for number, chunk in enumerate(chunks):
            await asyncio.sleep(waits[number] if number < len(waits) else 0)
            yield chunk

    async def run() -> list[Chunk]:
        return [merge_chunks(batch) async for batch in coalesce(source(), interval=0.002)]

    merged = merge_chunks(asyncio.run(run()))
    assert merged == Chunk(
        text="".join(texts),
        tokens=tuple(range(len(texts))),
        logprobs=tuple(TokenLogprob(number, text, 0.0) for number, text in enumerate(texts)),
    )


def timed(count: int, *, pace: float, interval: float) -> tuple[list[float], list[tuple[int, ...]]]:
    """When `count` chunks that come every `pace` seconds come through, and with which tokens."""

    async def go() -> tuple[list[float], list[tuple[int, ...]]]:
        times, tokens = list[float](), list[tuple[int, ...]]()
        async for batch in coalesce(stream_of([word(n) for n in range(count)], pace=pace), interval=interval):
            times.append(asyncio.get_running_loop().time())
            tokens.append(merge_chunks(batch).tokens)
        return times, tokens

    return virtual_time.run(go())


def test_the_first_piece_passes_at_once_and_the_next_ones_wait_for_the_beat() -> None:
    times, tokens = timed(60, pace=0.005, interval=0.1)
    assert times == pytest.approx([0.005, 0.105, 0.205, 0.3])  # the last comes with the end
    assert tokens[0] == (0,)
    assert sum(tokens, ()) == tuple(range(60))


def test_the_end_is_not_held_back_to_the_next_beat() -> None:
    times, tokens = timed(3, pace=0.01, interval=5.0)
    assert times == pytest.approx([0.01, 0.03])
    assert tokens == [(0,), (1, 2)]


async def test_an_error_comes_after_the_text_that_came_before_it() -> None:
    async def breaking() -> AsyncIterator[Chunk]:
        yield word(1)
        yield word(2)
        raise OSError("the connection broke")

    seen: list[int] = []

    async def read() -> None:
        async for batch in coalesce(breaking(), interval=0.01):
            seen.extend(merge_chunks(batch).tokens)

    with pytest.raises(OSError, match="the connection broke"):
        await read()
    assert seen == [1, 2]


async def test_closing_it_stops_the_reading_of_the_source() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncIterator[Chunk]:
        try:
            while True:
                await asyncio.sleep(0.001)
                yield word(1)
        finally:
            closed.set()

    source = endless()
    async with contextlib.aclosing(coalesce(source, interval=0.005)) as chunks:
        async for _chunk in chunks:
            break
    # Cancelled while it awaited, the source has run its `finally`.
    await asyncio.wait_for(closed.wait(), 1.0)


async def test_a_source_with_nothing_to_send_gives_nothing() -> None:
    assert [chunk async for chunk in coalesce(stream_of([]))] == []
