"""Which version wrote a story, where it may be written elsewhere: so that memory never mixes two of them."""

from __future__ import annotations

import asyncio

from model.generation import GenerationRequest, SamplingParams
from model.serving.backend import LocalBackend, ModelInfo
from model.serving.cache.backend import CachingBackend
from model.serving.cache.store import LRUCache, ResponseCache
from model.serving.remote.modal import FINGERPRINT_TTL
from tests.model.serving.http.serving import paced, serving
from tests.model.serving.remote.backends import CALM, auto, modal
from tests.model.serving.remote.broken import Line, broken

STORY = GenerationRequest(prompt="Once upon", max_tokens=20, sampling=SamplingParams(seed=5, temperature=0.9))
PAPER = "0123456789ab"
"""How the digest of `paced` begins."""


async def tell(backend: CachingBackend) -> tuple[str, str]:
    """The story, and who told it."""
    stream = await backend.submit(STORY)
    text = "".join([piece.text async for piece in stream])
    await asyncio.sleep(0.05)  # the end of a connection is noted a moment after the story's
    return text, stream.served_by


def cached_backend(backend: object) -> CachingBackend:
    return CachingBackend(backend, ResponseCache(LRUCache(1_000_000, 60), 60))  # type: ignore[arg-type]


async def test_the_version_there_is_known_once_it_has_written_and_while_that_is_news() -> None:
    with serving(paced()[0]) as running:
        backend = modal(running.url, timeouts=CALM)
        memory = cached_backend(backend)
        async with memory.running():
            assert await backend.fingerprint() is None
            first = await tell(memory)
            assert await backend.fingerprint() == f"{PAPER} at {running.url}"
            again = await tell(memory)
            where, what, seen = backend._fingerprint
            backend._fingerprint = (where, what, seen - FINGERPRINT_TTL)
            assert await backend.fingerprint() is None
    # The first was asked for before anyone knew who would write it, and is kept under what it was written by.
    assert (first[1], again[1]) == ("modal", "cache")
    assert again[0] == first[0]


async def test_a_switch_to_another_deployment_asks_for_the_story_anew() -> None:
    green, _ = paced()
    green = LocalBackend(green.engine, ModelInfo("green", "9" * 64), capacity=4)
    with serving(paced()[0]) as one, serving(green) as two:
        urls = [one.url]
        memory = cached_backend(modal(lambda: urls[-1], timeouts=CALM))
        async with memory.running():
            told = [await tell(memory) for _ in range(3)]
            urls.append(two.url)
            told += [await tell(memory) for _ in range(3)]
    assert [writer for _, writer in told] == ["modal", "cache", "cache"] * 2
    assert memory.cache.memory.evictions == 0
    assert len(memory.cache.memory) == 2, "one story of each version"


async def test_a_story_that_two_writers_share_is_not_kept() -> None:
    async def breaks(line: Line) -> None:
        await line.open()
        await line.words(5)

    local, _ = paced(slots=4)
    async with broken(breaks) as service:
        memory = cached_backend(auto(service.url, local=local, timeouts=CALM))
        async with memory.running():
            await tell(memory)
            assert len(memory.cache.memory) == 0
            assert await memory.backend.fingerprint() is None, (
                "Modal would begin the next, and has not said who it is"
            )


async def test_while_modal_is_gone_stories_are_remembered_as_those_of_the_model_here() -> None:
    local, _ = paced(slots=4)
    memory = cached_backend(auto("http://127.0.0.1:1", local=local, failures=1))
    async with memory.running():
        first = await tell(memory)
        assert await memory.backend.fingerprint() == await local.fingerprint()
        again = await tell(memory)
    assert again == (first[0], "cache")
