"""Failover from Modal to the engine in this process: which backend, from where, and with which text."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer import TyperException
from typer.main import get_command

import story
from model.architecture.tokenizer import StoryTokenizer
from model.engine.stream import StopMatcher
from model.errors import BusyError, InputError, StoryError
from model.generation import MAX_PROMPT_CHARS, Chunk, Completion, GenerationRequest, SamplingParams
from model.serving.backend import LocalBackend, Stream
from model.serving.remote import BACKENDS, open_backend
from model.serving.remote.client import fetch_model_info
from model.serving.remote.modal import ContinuedStop, FailoverBackend, FailoverStream, ModalBackend
from model.settings import Settings
from tests.model.engines import TOKENIZER
from tests.model.serving.http.serving import paced, serving
from tests.model.serving.remote.servers import CALM, QUICK, Line, Script, alone, auto, broken, text_of

NOWHERE = "http://127.0.0.1:1"


@pytest.mark.parametrize("kind", ["auto", "local"])
def test_without_use_modal_stories_are_written_here_even_with_an_address(kind: str) -> None:
    backend = open_backend(kind, Settings(story_slots=1, modal_endpoint_url=NOWHERE))
    assert isinstance(backend, LocalBackend)


def test_with_use_modal_auto_has_both_and_takes_its_times_from_the_settings() -> None:
    settings = Settings(
        story_slots=1, use_modal=True, modal_endpoint_url=NOWHERE, story_response_timeout=0.7, story_breaker_failures=2
    )
    backend = open_backend("auto", settings)
    assert isinstance(backend, FailoverBackend)
    assert backend.capacity == backend.modal.capacity
    health = backend.health()
    assert (health.ready, health.served_by, health.breaker) == (True, "modal", "closed")
    assert health.engine is not None


def test_modal_alone_needs_an_address() -> None:
    with pytest.raises(InputError, match=r"^MODAL_ENDPOINT_URL must be set to use Modal$"):
        open_backend("modal", Settings())


def test_modal_alone_asks_the_service_which_model_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    patient = partial(fetch_model_info, seconds=20)  # the machine may be busy
    monkeypatch.setattr("model.serving.remote.client.fetch_model_info", patient)
    there = paced()[0]
    with serving(there) as running:
        backend = open_backend("modal", Settings(modal_endpoint_url=running.url))
    assert isinstance(backend, ModalBackend)
    assert backend.model == there.model
    assert open_backend("modal", Settings(modal_endpoint_url=NOWHERE)).model.version == "unknown"


def test_the_command_line_offers_the_same_names() -> None:
    command = get_command(story.app).commands["demo"]  # type: ignore[attr-defined]
    for name in BACKENDS:
        assert command.make_context("demo", ["--backend", name]).params["backend"] == name
    with pytest.raises(TyperException, match="cloud"):
        command.make_context("demo", ["--backend", "cloud"])


ASKED = GenerationRequest(prompt="Once upon a time a fox", max_tokens=40, sampling=SamplingParams(seed=3))


async def read(stream: Stream) -> tuple[list[Chunk], Completion]:
    chunks = [chunk async for chunk in stream]
    return chunks, stream.completion


def sends(*events: object) -> Script:
    """A service that sends these chunks and is cut off after the last."""

    async def script(line: Line) -> None:
        await line.open()
        for event in events:
            await line.event({"choices": [{"index": 0, **event}]})  # type: ignore[dict-item]

    return script


async def generate(script: Script, request: GenerationRequest) -> tuple[list[Chunk], Completion, FailoverBackend]:
    """A story that begins with `script`."""
    async with broken(script) as service:
        backend = auto(service.url)
        async with backend.running():
            return *await read(await backend.submit(request)), backend


def logprobs(*texts: str) -> dict[str, object]:
    """The fields of a chunk with these tokens, numbered from 1, as the service sends them."""
    ids = list(range(1, len(texts) + 1))
    best = [[[token, text, -0.5], [99, "x", -2.5]] for token, text in zip(ids, texts, strict=True)]
    lists = {"tokens": texts, "token_logprobs": [-0.5] * len(texts), "alternatives": best}
    return {"text": "".join(texts), "token_ids": ids, "logprobs": lists}


async def test_tokens_times_and_log_probabilities_add_up_over_both_backends() -> None:
    request = replace(ASKED, logprobs=2)
    chunks, completion, _ = await generate(sends(logprobs(" a", " frog"), logprobs(" and")), request)
    here = alone(replace(request, prompt=f"{request.prompt} a frog and", max_tokens=37))
    assert completion.text == "".join(chunk.text for chunk in chunks) == " a frog and" + here.text
    assert completion.logprobs == sum((chunk.logprobs for chunk in chunks), ())
    assert [entry.text for entry in completion.logprobs[:3]] == [" a", " frog", " and"]
    assert completion.logprobs[0].alternatives == ((1, " a", -0.5), (99, "x", -2.5))
    assert completion.logprobs[3:] == here.logprobs
    usage = completion.usage
    assert usage.completion_tokens == 40 == sum(len(chunk.tokens) for chunk in chunks)
    assert usage.prompt_tokens == len(TOKENIZER.encode(str(request.prompt))), "not the text so far"
    assert 0 < usage.ttft < usage.duration


async def test_a_token_whose_text_never_came_is_written_again_and_not_counted_twice() -> None:
    half = sends({"text": " a", "token_ids": [7]}, {"text": "", "token_ids": [8]}, {"text": "", "token_ids": [9]})
    chunks, completion, _ = await generate(half, ASKED)
    assert chunks[0] == Chunk(" a", (7,))
    assert completion.text == " a" + alone(replace(ASKED, prompt=f"{ASKED.prompt} a", max_tokens=39)).text
    assert completion.usage.completion_tokens == 40


async def test_a_token_that_waited_for_its_text_comes_with_it() -> None:
    script = sends(
        {"text": "", "token_ids": [8]},
        {"text": "é", "token_ids": [9]},
        {"text": "", "token_ids": [5]},
        {"text": "", "finish_reason": "length"},
    )
    chunks, completion, _ = await generate(script, ASKED)
    assert chunks == [Chunk("é", (8, 9)), Chunk("", (5,))]
    assert (completion.text, completion.finish_reason, completion.usage.completion_tokens) == ("é", "length", 3)


async def test_a_story_ended_at_its_very_length_has_its_length() -> None:
    chunks, completion, backend = await generate(
        sends({"text": " a b", "token_ids": [1, 2]}), replace(ASKED, max_tokens=2)
    )
    assert (completion.text, completion.finish_reason) == (" a b", "length")
    assert len(chunks) == 1
    assert backend.local.engine.stats().prompt_tokens == 0


@pytest.mark.parametrize("stop", ["e", "th", "zzz"])
async def test_stop_strings_hold_after_the_change(stop: str) -> None:
    request = replace(ASKED, max_tokens=80, stop=(stop, "qqq"))
    _, completion, _ = await generate(sends({"text": " a b", "token_ids": [1, 2]}), request)
    free = alone(replace(request, prompt=f"{request.prompt} a b", max_tokens=78, stop=())).text
    assert completion.text == " a b" + free.partition(stop)[0]
    assert completion.finish_reason == ("stop" if stop in free else "length")


async def test_a_stop_string_that_began_with_modal_and_is_completed_here_ends_the_story() -> None:
    here = alone(replace(ASKED, prompt=f"{ASKED.prompt} a b", max_tokens=38)).text
    stop = f"b{here[:3]}"
    chunks, completion, _ = await generate(sends({"text": " a b", "token_ids": [1, 2]}), replace(ASKED, stop=(stop,)))
    assert (completion.text, completion.finish_reason) == (" a b", "stop"), "what a client has stays, no more comes"
    assert "".join(chunk.text for chunk in chunks) == " a b"


async def test_a_story_longer_than_a_prompt_may_be_goes_on_from_its_end() -> None:
    request = replace(ASKED, prompt=("a fox and " * MAX_PROMPT_CHARS)[:MAX_PROMPT_CHARS], max_tokens=4)
    _, completion, _ = await generate(sends({"text": " a b", "token_ids": [1, 2]}), request)
    here = alone(replace(request, prompt=f"{request.prompt[4:]} a b", max_tokens=2))
    assert completion.text == " a b" + here.text


async def test_a_cancel_reaches_whoever_writes() -> None:
    async def script(line: Line) -> None:
        await line.open()
        await line.words(3)

    async with broken(script) as service:
        backend = auto(service.url, local=paced(step_seconds=0.01)[0])
        async with backend.running():
            stream = await backend.submit(replace(ASKED, max_tokens=2000))
            assert isinstance(stream, FailoverStream)
            with pytest.raises(StoryError, match="still being written"):
                _ = stream.completion
            count = 0
            async for _ in stream:
                count += stream.served_by == "local"
                if count == 3:
                    stream.cancel()
            assert stream.completion.finish_reason == "cancelled"
            assert stream.completion.text.startswith(text_of(3))
            stats = backend.local.engine.stats()
            assert (stats.active, stats.finished["cancelled"]) == (0, 1)


async def test_a_cancel_while_modal_starts_begins_nothing_here() -> None:
    async def script(line: Line) -> None:
        await line.closed()

    async with broken(script) as service:
        backend = auto(service.url, timeouts=CALM)
        async with backend.running():
            stream = await backend.submit(ASKED)
            stream.cancel()
            assert await read(stream) == ([], stream.completion)
            assert stream.completion.finish_reason == "cancelled"
            assert backend.local.engine.stats().prompt_tokens == 0


async def test_a_queue_that_is_full_on_both_sides_is_raised_by_submit() -> None:
    async def script(line: Line) -> None:
        await line.status(429, "queue full")

    async with broken(script) as service:
        backend = auto(service.url, local=paced(slots=1, queue=0, step_seconds=0.01)[0])
        async with backend.running():
            first = await backend.submit(replace(ASKED, max_tokens=2000))
            assert first.served_by == "local"
            with pytest.raises(BusyError):
                await backend.submit(ASKED)
            first.cancel()


async def test_a_story_lost_on_modal_with_no_place_here_keeps_what_it_has_and_says_why() -> None:
    async with broken(sends({"text": " a b", "token_ids": [1, 2]})) as service:
        backend = auto(service.url, local=paced(slots=1, queue=0, step_seconds=0.01)[0])
        async with backend.running():
            taken = await backend.local.submit(replace(ASKED, max_tokens=2000))
            _, completion = await read(await backend.submit(ASKED))
            taken.cancel()
    assert (completion.text, completion.finish_reason) == (" a b", "error")
    assert completion.error is not None
    assert completion.error.startswith("Modal was lost, and ")


async def test_failures_in_a_row_open_the_breaker_and_one_probe_closes_it() -> None:
    down = True

    async def script(line: Line) -> None:
        if down:
            await line.status(500, "out of order")
            return
        await line.open()
        await line.words(2)
        await line.end()

    async with broken(script) as service:
        backend = auto(service.url, failures=3, reset=0.3)
        async with backend.running():
            for asked in (1, 2, 3):
                assert backend.health().breaker == "closed"
                await read(await backend.submit(ASKED))
                assert service.connections == asked
            health = backend.health()
            assert (health.ready, health.served_by, health.breaker) == (True, "local", "open")
            assert health.detail == "Modal failed: HTTP 500: out of order; the embedded model is used"
            assert (await backend.submit(ASKED)).served_by == "local"
            assert service.connections == 3, "nobody asks while it is open"
            async with asyncio.timeout(20):
                while service.connections < 4 or backend.health().breaker != "open":  # the probe, which fails
                    await asyncio.sleep(0.01)
            down = False
            async with asyncio.timeout(20):
                while backend.health().breaker != "closed":
                    await asyncio.sleep(0.01)
            assert service.bodies[-1]["max_tokens"] == 1
            _, completion = await read(await backend.submit(ASKED))
    assert completion.text == text_of(2)


async def test_a_cold_start_costs_one_client_the_timeout_and_the_probe_sits_it_out() -> None:
    warm = asyncio.Event()

    async def script(line: Line) -> None:
        await warm.wait()
        await line.open()
        await line.words(2)
        await line.end()

    loop = asyncio.get_running_loop()
    async with broken(script) as service:
        backend = auto(service.url, reset=0.1)
        async with backend.running():
            began = loop.time()
            _, first = await read(await backend.submit(ASKED))
            assert QUICK.story_response_timeout - 0.1 < first.usage.ttft <= loop.time() - began
            assert backend.health().breaker != "closed"
            async with asyncio.timeout(20):
                while backend.health().breaker != "half-open":
                    await asyncio.sleep(0.01)
            await asyncio.sleep(QUICK.story_response_timeout + 0.5)
            assert backend.health().breaker == "half-open", "longer than any user would wait"
            stream = await backend.submit(ASKED)
            assert stream.served_by == "local", "nobody else waits for it"
            _, second = await read(stream)
            assert second.text == first.text
            warm.set()
            async with asyncio.timeout(20):
                while backend.health().breaker != "closed":
                    await asyncio.sleep(0.01)
            assert service.connections == 2


async def test_another_deployment_begins_with_a_clean_record() -> None:
    urls = ["http://127.0.0.1:1"]
    backend = auto(lambda: urls[0], failures=1)
    with serving(paced()[0]) as running:
        async with backend.running():
            await read(await backend.submit(ASKED))
            assert backend.health().breaker == "open"
            urls[0] = running.url
            stream = await backend.submit(ASKED)
            _, completion = await read(stream)
            assert stream.served_by == "modal"
    assert completion.text == alone(ASKED).text


def test_the_model_that_a_link_names_is_the_one_here() -> None:
    backend = auto("http://127.0.0.1:1")
    assert backend.model == backend.local.model
    assert isinstance(backend.local.engine.tokenizer, StoryTokenizer)


letters = st.text("ab", max_size=12)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), letters, st.lists(letters, max_size=4))
@example(["aab"], "aaa", ["ab", "b"])  # let through as the third of four a's, and yet the start of a stop string
def test_a_story_ends_where_one_matcher_over_all_of_it_would_end_it(
    stops: list[str], begun: str, rest: list[str]
) -> None:
    shown = StopMatcher(stops).push(begun)  # what the first writer let through before it was lost
    stop = ContinuedStop(tuple(stops), shown)
    generate = shown
    for text in rest:
        generate += stop.push(text)
        if stop.stopped:
            break
    else:
        generate += stop.flush()
    whole = StopMatcher(stops)
    expected = whole.push(shown + "".join(rest)) + whole.flush()
    assert stop.stopped == whole.stopped
    assert generate == (expected if len(expected) > len(shown) else shown)  # what a client has is never taken back
