"""The backend on Modal: requests, refusals, retries, the circuit breaker and fingerprints."""

from __future__ import annotations

import asyncio
import logging

import pytest

from model.errors import BusyError, InputError, StoryError
from model.generation import Chunk, Completion, GenerationRequest, SamplingParams
from model.serving.backend import LocalBackend, ModelInfo, Stream
from model.serving.cache import CachingBackend, LRUCache, ResponseCache
from model.serving.remote.client import REFUSED, UNREACHABLE, RemoteError, fetch_model_info, proxy_auth
from model.serving.remote.modal import FINGERPRINT_TTL, Breaker, ModalBackend, ModalStream
from model.settings import Settings
from tests import virtual_time
from tests.model.serving.http.serving import Running, paced, serving
from tests.model.serving.remote.servers import CALM, QUICK, Line, alone, auto, broken, modal, text_of

REQUESTS = {
    "plain": GenerationRequest(prompt="Once upon", max_tokens=40, sampling=SamplingParams(seed=5)),
    "greedy": GenerationRequest(prompt="", max_tokens=25, sampling=SamplingParams(temperature=0)),
    "hot": GenerationRequest(
        prompt="„Grüß dich“ 🦊\n", max_tokens=60, sampling=SamplingParams(temperature=1.8, top_k=30, seed=2**40)
    ),
    "penalised": GenerationRequest(
        prompt="The fox", max_tokens=40, sampling=SamplingParams(repetition_penalty=1.5, min_p=0.01)
    ),
    "stopped": GenerationRequest(prompt="Once upon", max_tokens=200, stop=("e", "zz"), sampling=SamplingParams(seed=5)),
    "weighed": GenerationRequest(
        prompt="Once upon", max_tokens=20, logprobs=3, sampling=SamplingParams(temperature=1.5, seed=9)
    ),
}


async def read(stream: Stream) -> tuple[list[Chunk], Completion]:
    chunks = [chunk async for chunk in stream]
    return chunks, stream.completion


async def begin(backend: ModalBackend, request: GenerationRequest) -> ModalStream:
    stream = await backend.submit(request)
    assert isinstance(stream, ModalStream)
    return stream


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
async def test_a_story_over_the_wire_is_the_one_that_the_engine_writes(request_: GenerationRequest) -> None:
    expected = alone(request_)
    with serving(paced()[0]) as running:
        backend = modal(running.url, timeouts=CALM)
        async with backend.running():
            chunks, completion = await read(await backend.submit(request_))
    assert completion.text == "".join(chunk.text for chunk in chunks) == expected.text
    assert completion.finish_reason == expected.finish_reason
    assert completion.logprobs == sum((chunk.logprobs for chunk in chunks), ()) == expected.logprobs
    assert sum(len(chunk.tokens) for chunk in chunks) == expected.usage.completion_tokens
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        expected.usage.prompt_tokens,
        expected.usage.completion_tokens,
    )
    assert 0 < usage.ttft <= usage.duration < 10


async def test_the_next_story_goes_over_the_same_connection() -> None:
    with serving(paced()[0]) as running:
        backend = modal(running.url, timeouts=CALM)
        async with backend.running():
            for _ in range(3):
                await read(await backend.submit(GenerationRequest(prompt="Once", max_tokens=5)))
                await asyncio.sleep(0.05)
            assert len(running.server.server_state.connections) == 1


async def slot_free(running: Running) -> None:
    """The service's own metric says that nobody writes, long before the stories of these tests would have ended."""
    async with asyncio.timeout(20):
        while (await asyncio.to_thread(running.figures))["story_slots_active"]:
            await asyncio.sleep(0.005)


async def test_a_cancel_ends_the_story_at_once_and_frees_the_slot_at_the_other_end() -> None:
    with serving(paced(step_seconds=0.01)[0]) as running:
        backend = modal(running.url, timeouts=CALM)
        async with backend.running():
            stream = await begin(backend, GenerationRequest(prompt="Once", max_tokens=4000))
            chunks = []
            async for chunk in stream:
                chunks.append(chunk)
                if len(chunks) == 5:
                    stream.cancel()
            assert len(chunks) < 10
            assert stream.completion.finish_reason == "cancelled"
            assert stream.completion.text.startswith("".join(chunk.text for chunk in chunks[:5]))
            stream.cancel()  # harmless
            await slot_free(running)
            assert running.figures()['story_streams_total{outcome="cancelled"}'] == 1
            assert backend.breaker.failures == 0


async def test_leaving_the_backend_ends_what_is_running() -> None:
    with serving(paced(step_seconds=0.01)[0]) as running:
        backend = modal(running.url, timeouts=CALM)
        async with backend.running():
            stream = await begin(backend, GenerationRequest(prompt="Once", max_tokens=4000))
            with pytest.raises(StoryError, match="still being written"):
                _ = stream.completion
            await anext(stream)
        assert stream.completion.finish_reason == "cancelled"
        await slot_free(running)
    with pytest.raises(StoryError, match="not running"):
        await backend.submit(GenerationRequest(prompt=""))


async def test_a_full_queue_there_is_a_busy_error_that_says_when_to_come_back() -> None:
    with serving(paced(slots=1, queue=0, step_seconds=0.01)[0]) as running:
        backend = modal(running.url, timeouts=CALM)
        async with backend.running():
            first = await begin(backend, GenerationRequest(prompt="Once", max_tokens=4000))
            await anext(first)
            with pytest.raises(BusyError) as caught:
                await backend.submit(GenerationRequest(prompt="Once"))
            assert caught.value.retry_after >= 1
            first.cancel()


async def test_what_the_service_does_not_take_is_an_input_error_with_its_field() -> None:
    async def script(line: Line) -> None:
        error = '{"error": {"type": "invalid_request_error", "message": "top_k must be below 9", "param": "top_k"}}'
        head = f"HTTP/1.1 422 X\r\nContent-Length: {len(error)}\r\nConnection: close\r\n\r\n"
        await line.raw((head + error).encode())

    async with broken(script) as service:
        backend = modal(service.url)
        async with backend.running():
            with pytest.raises(InputError, match=r"^top_k must be below 9$") as caught:
                await backend.submit(GenerationRequest(prompt="Once"))
            assert backend.breaker.failures == 0, "it says nothing about the service"
    assert caught.value.param == "top_k"


async def test_a_token_is_sent_and_a_refused_one_is_the_operators_affair(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(modal_key="wk-key", modal_secret="ws-hunter2")  # type: ignore[arg-type]

    async def script(line: Line) -> None:
        await line.status(401, "modal-http: invalid proxy token")

    with caplog.at_level(logging.INFO):
        async with broken(script) as service:
            backend = modal(service.url, headers=proxy_auth(settings))
            async with backend.running():
                with pytest.raises(RemoteError, match=REFUSED):
                    await backend.submit(GenerationRequest(prompt="Once"))
                health = backend.health()
    head = service.heads[0].lower()
    assert "modal-key: wk-key" in head
    assert "modal-secret: ws-hunter2" in head
    assert "check MODAL_KEY and MODAL_SECRET" in caplog.text
    assert "hunter2" not in caplog.text + str(health)


@pytest.mark.parametrize("secret", ["line\nbreak", "ümlaut", " hunter2"])
def test_a_token_that_cannot_travel_is_named_and_not_shown(secret: str) -> None:
    settings = Settings(modal_key="wk-key", modal_secret=secret)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^MODAL_SECRET must be plain ASCII") as caught:
        proxy_auth(settings)
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    ("codes", "fail_fast", "written", "asked"),
    [
        ([503, 502, 200], False, True, 3),
        ([504, 200], True, True, 2),
        ([503, 503, 200], True, False, 2),
        ([500, 200], False, False, 1),
    ],
    ids=["until the timeout", "once, failing fast", "not twice, failing fast", "never after a fault"],
)
async def test_only_what_may_pass_is_tried_again_and_only_before_the_first_token(
    codes: list[int], fail_fast: bool, written: bool, asked: int
) -> None:
    left = list(codes)

    async def script(line: Line) -> None:
        code = left.pop(0)
        if code != 200:
            await line.status(code)
            return
        await line.open()
        await line.words(3)
        await line.end()

    async with broken(script) as service:
        backend = modal(service.url, fail_fast=fail_fast, timeouts=CALM)
        async with backend.running():
            if written:
                assert (await read(await backend.submit(GenerationRequest(prompt="Once"))))[1].text == text_of(3)
            else:
                with pytest.raises(RemoteError, match=UNREACHABLE):
                    await read(await backend.submit(GenerationRequest(prompt="Once")))
    assert service.connections == asked
    assert len({str(body) for body in service.bodies}) == 1, "the same request, seed included"


async def test_a_story_that_breaks_off_is_not_restarted_but_reported_as_broken() -> None:
    async def script(line: Line) -> None:
        await line.open()
        await line.words(4)

    async with broken(script) as service:
        backend = modal(service.url)
        async with backend.running():
            chunks, completion = await read(await backend.submit(GenerationRequest(prompt="Once")))
    assert "".join(chunk.text for chunk in chunks) == completion.text == text_of(4)
    assert completion.finish_reason == "error"
    assert completion.error == "the connection to the model on Modal was lost"
    assert completion.usage.completion_tokens == 4
    assert service.connections == 1


async def test_the_response_timeout_bounds_all_tries_together() -> None:
    async def script(line: Line) -> None:
        await line.status(503, "starting")

    loop = asyncio.get_running_loop()
    async with broken(script) as service:
        backend = modal(service.url)
        async with backend.running():
            began = loop.time()
            with pytest.raises(RemoteError, match=UNREACHABLE):
                await read(await backend.submit(GenerationRequest(prompt="Once")))
            assert loop.time() - began > QUICK.story_response_timeout - 0.1
            assert "no first token within 0.5 s (last: HTTP 503: starting)" in backend.health().detail
    assert service.connections > 2


async def test_while_a_service_starts_the_stream_is_there_already_and_can_be_stopped() -> None:
    async def script(line: Line) -> None:
        await line.closed()

    async with broken(script) as service:
        backend = modal(service.url, timeouts=CALM)
        async with backend.running():
            async with asyncio.timeout(CALM.story_response_timeout - 1):
                stream = await begin(backend, GenerationRequest(prompt="Once"))
                stream.cancel()
                assert await read(stream) == ([], stream.completion)
            assert stream.completion.finish_reason == "cancelled"
            async with asyncio.timeout(20):
                while not service.gone:
                    await asyncio.sleep(0.005)


def test_a_service_says_which_model_it_has() -> None:
    backend = paced()[0]
    with serving(backend) as running:
        assert fetch_model_info(running.url, {}) == backend.model
        assert fetch_model_info(f"{running.url}/nowhere", {}) == "HTTP 404: there is nothing at /nowhere/v1/models"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://127.0.0.1:99999", "ftp://127.0.0.1"])
async def test_an_address_that_leads_nowhere_is_a_failure_like_others(url: str) -> None:
    assert isinstance(fetch_model_info(url, {}), str)
    backend = modal(url, fail_fast=True)
    async with backend.running():
        with pytest.raises(RemoteError, match=UNREACHABLE):
            await read(await backend.submit(GenerationRequest(prompt="Once")))
    assert not backend.breaker.closed or backend.breaker.failures == 1


def test_only_failures_in_a_row_open_it() -> None:
    breaker = Breaker(3, 10)
    for _ in range(5):
        breaker.failed("refused")
        breaker.failed("refused")
        assert breaker.closed
        breaker.succeeded()
    for _ in range(3):
        breaker.failed("refused")
    assert (breaker.state, breaker.reason) == ("open", "refused")


def test_a_failure_that_took_a_time_out_opens_it_at_once() -> None:
    breaker = Breaker(3, 10)
    breaker.failed("no token", slow=True)
    assert breaker.state == "open"


async def recovery(breaker: Breaker, *probes: tuple[str, float]) -> list[tuple[float, str]]:
    """Open a breaker whose probes return these reasons after so many seconds: when each began, and the state then."""
    loop = asyncio.get_running_loop()
    began, left = loop.time(), list(probes)
    seen: list[tuple[float, str]] = []

    async def probe() -> str:
        seen.append((round(loop.time() - began, 3), breaker.state))
        reason, seconds = left.pop(0)
        await asyncio.sleep(seconds)
        return reason

    breaker.failed("refused")
    await breaker.recover(probe)
    return seen


def test_after_each_pause_one_probe_is_made_until_one_succeeds() -> None:
    breaker = Breaker(1, 10)
    seen = virtual_time.run(recovery(breaker, ("still refused", 5.0), ("and again", 0.0), ("", 1.0)))
    assert seen == [(10.0, "half-open"), (25.0, "half-open"), (35.0, "half-open")]
    assert (breaker.state, breaker.reason, breaker.failures) == ("closed", "", 0)


def test_stories_that_fail_while_it_is_open_do_not_put_the_probe_off() -> None:
    breaker = Breaker(1, 10)

    async def both() -> list[tuple[float, str]]:
        asyncio.get_running_loop().call_later(6, breaker.failed, "another one cut")
        return await recovery(breaker, ("", 0.0))

    assert virtual_time.run(both()) == [(10.0, "half-open")]


def test_a_story_that_ends_well_while_it_is_open_closes_it_and_a_late_probe_changes_nothing() -> None:
    breaker = Breaker(1, 10)

    async def both(seconds: float) -> list[tuple[float, str]]:
        asyncio.get_running_loop().call_later(seconds, breaker.succeeded)
        return await recovery(breaker, ("late", 5.0))

    assert virtual_time.run(both(4)) == []
    assert breaker.closed
    assert virtual_time.run(both(12)) == [(10.0, "half-open")]
    assert (breaker.closed, breaker.failures) == (True, 0)


STORY = GenerationRequest(prompt="Once upon", max_tokens=20, sampling=SamplingParams(seed=5, temperature=0.9))
PAPER = "0123456789ab"
"""How the digest of `paced` begins."""


async def generate(backend: CachingBackend) -> tuple[str, str]:
    """The story, and which backend served it."""
    stream = await backend.submit(STORY)
    text = "".join([chunk.text async for chunk in stream])
    await asyncio.sleep(0.05)  # the end of a connection is recorded a moment after the story's
    return text, stream.served_by


def cached_backend(backend: object) -> CachingBackend:
    return CachingBackend(backend, ResponseCache(LRUCache(1_000_000, 60), 60))  # type: ignore[arg-type]


async def test_the_version_there_is_known_once_it_has_written_and_while_that_is_news() -> None:
    with serving(paced()[0]) as running:
        backend = modal(running.url, timeouts=CALM)
        memory = cached_backend(backend)
        async with memory.running():
            assert await backend.fingerprint() is None
            first = await generate(memory)
            assert await backend.fingerprint() == f"{PAPER} at {running.url}"
            again = await generate(memory)
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
            answers = [await generate(memory) for _ in range(3)]
            urls.append(two.url)
            answers += [await generate(memory) for _ in range(3)]
    assert [served_by for _, served_by in answers] == ["modal", "cache", "cache"] * 2
    assert memory.cache.memory.evictions == 0
    assert len(memory.cache.memory) == 2, "one story of each version"


async def test_a_story_that_two_backends_share_is_not_kept() -> None:
    async def breaks(line: Line) -> None:
        await line.open()
        await line.words(5)

    local, _ = paced(slots=4)
    async with broken(breaks) as service:
        memory = cached_backend(auto(service.url, local=local, timeouts=CALM))
        async with memory.running():
            await generate(memory)
            assert len(memory.cache.memory) == 0
            assert await memory.backend.fingerprint() is None, "Modal would begin the next, and has not said who it is"


async def test_while_modal_is_gone_stories_are_remembered_as_those_of_the_model_here() -> None:
    local, _ = paced(slots=4)
    memory = cached_backend(auto("http://127.0.0.1:1", local=local, failures=1))
    async with memory.running():
        first = await generate(memory)
        assert await memory.backend.fingerprint() == await local.fingerprint()
        again = await generate(memory)
    assert again == (first[0], "cache")
