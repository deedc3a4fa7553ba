"""Every way in which Modal can fail, for real, as a user and as a program meet it: a whole story each time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from demo import handlers
from demo.form import Form
from demo.handlers import View
from model.generation import GenerationRequest, SamplingParams
from model.serving.http.app import create_service
from model.serving.http.server import DrainingServer, bound, url_of
from model.serving.remote.modal import FailoverBackend
from tests import virtual_time
from tests.demo.scripted import state_of
from tests.model.serving.remote.servers import Line, Script, alone, auto, broken, text_of

USUAL = SamplingParams()
LENGTH = 60
PROMPT = "Once upon a time a fox"


async def hang(line: Line) -> None:
    await line.closed()


async def hang_after_the_head(line: Line) -> None:
    await line.open()
    await line.closed()


async def comments(line: Line) -> None:
    while True:
        await line.raw(b": still here\n\n")
        await asyncio.sleep(0.05)


async def keep_alive_only(line: Line) -> None:
    await line.open()
    await comments(line)


async def cold_start(line: Line) -> None:
    await asyncio.sleep(5)  # the timeout is half a second here, so this is a start of minutes
    await line.open()
    await line.words(20)
    await line.end()


def answers(code: int, message: str = "", **headers: str) -> Script:
    async def script(line: Line) -> None:
        await line.status(code, message, **headers)

    return script


async def no_events(line: Line) -> None:
    await line.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\nhello")


async def no_http(line: Line) -> None:
    await line.raw(b"\x16\x03\x01\x02\x00SSH-2.0 or whatever\r\n\r\n")


async def error_at_once(line: Line) -> None:
    await line.open()
    await line.event({"error": {"message": "out of memory", "type": "internal_error"}}, "error")


async def done_at_once(line: Line) -> None:
    await line.open()
    await line.event("[DONE]")


async def cut(line: Line) -> None:
    await line.open()
    await line.words(20)


async def falls_silent(line: Line) -> None:
    await line.open()
    await line.words(7)
    await comments(line)


async def reset(line: Line) -> None:
    await line.open()
    await line.words(5)
    linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # on, for 0 s: closing sends RST
    line.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def then_raw(data: bytes) -> Script:
    async def script(line: Line) -> None:
        await line.open()
        await line.words(5)
        await line.raw(data)

    return script


async def breaks_off(line: Line) -> None:
    await line.open()
    await line.words(5)
    await line.event({"error": {"message": "draining", "type": "service_unavailable"}}, "error")


async def lies_about_its_length(line: Line) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    event = b'data: {"choices": [{"index": 0, "text": " saw", "token_ids": [1]}]}\n\n'
    await line.raw(head + b"%x\r\n%b\r\n" % (len(event), event) + b"ffff\r\nhalf a chunk")


@dataclass(frozen=True)
class Case:
    """A script, and how many of its words reach the client before this process goes on."""

    script: Script | None  # None: nothing listens there
    words: int = 0


CASES = {
    "refused": Case(None),
    "hung": Case(hang),
    "hung after its head": Case(hang_after_the_head),
    "alive without a token": Case(keep_alive_only),
    "a cold start": Case(cold_start),
    "500": Case(answers(500, "something went wrong")),
    "500 without a body": Case(answers(500)),
    "502": Case(answers(502)),
    "503": Case(answers(503, "draining", Retry_After="2")),
    "401": Case(answers(401, "no such token")),
    "404": Case(answers(404)),
    "a redirect": Case(answers(303, Location="/elsewhere")),
    "429": Case(answers(429, "queue full", Retry_After="7")),
    "413": Case(answers(413, "too long")),
    "another kind of answer": Case(no_events),
    "no HTTP": Case(no_http),
    "an error at once": Case(error_at_once),
    "done at once": Case(done_at_once),
    "cut after 20 tokens": Case(cut, 20),
    "silent after 7": Case(falls_silent, 7),
    "reset after 5": Case(reset, 5),
    "an error after 5": Case(breaks_off, 5),
    "an event that is no JSON": Case(then_raw(b"data: {hello\n\n"), 5),
    "an event of another shape": Case(then_raw(b'data: {"choices": [{"text": 7}]}\n\n'), 5),
    "half an event": Case(then_raw(b'data: {"choices": [{"index": 0, "text": " lost", "token'), 5),
    "half an event, well formed": Case(then_raw(b'data: {"choices": [{"index": 0, "text": " lost"}]}\n'), 5),
    "garbage": Case(then_raw(bytes(range(256)) * 40 + b"\n\ndata: \xff\xfe\n\n"), 5),
    "half a surrogate": Case(then_raw(b'data: {"choices": [{"text": "\\ud83e"}]}\n\n'), 5),
    "a length that is not true": Case(lies_about_its_length, 1),
}


@pytest.fixture(scope="module")
def refused() -> Iterator[str]:
    """An address that nobody listens on, and nobody else can take."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@contextlib.asynccontextmanager
async def failing(case: Case, refused: str) -> AsyncIterator[str]:
    """The address of a service that fails so."""
    if case.script is None:
        yield refused
    else:
        async with broken(case.script) as service:
            yield service.url


@contextlib.asynccontextmanager
async def hosted(backend: FailoverBackend) -> AsyncIterator[str]:
    """The address of the service over `backend`, whose server runs in this loop."""
    with bound("127.0.0.1", 0) as listener:
        server = DrainingServer(create_service(backend))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0)
        yield url_of(listener, "127.0.0.1")
        server.should_exit = True
        await serving


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test's coroutine in virtual time: no time-out is waited for, or comes early on a busy machine."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        virtual_time.run(test(**arguments), patience=0.02)

    return run


async def read(backend: FailoverBackend, form: Form) -> list[View]:
    return [view async for view in handlers.write(state_of(backend), "me", form)]


def expected(words: int, length: int = LENGTH, seed: int = 3) -> str:
    """The part of a story sent so far: Modal's words, and what the engine here makes of them."""
    begun = text_of(words)
    sampling = SamplingParams(seed=seed)
    return begun + alone(GenerationRequest(prompt=PROMPT + begun, max_tokens=length - words, sampling=sampling)).text


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@in_virtual_time
async def test_the_page_shows_the_whole_story_and_its_backend(case: Case, refused: str) -> None:
    words = case.words
    async with failing(case, refused) as url:
        backend = auto(url)
        async with backend.running():
            views = await read(backend, Form(prompt=PROMPT, max_tokens=LENGTH, seed=3))
    last = views[-1]
    assert last.phase == "open", last.status  # it met its length
    assert last.generated == expected(words)
    assert f"{LENGTH} tokens ·" in last.figures
    assert all(later.generated.startswith(sooner.generated) for sooner, later in itertools.pairwise(views))
    who = "written on Modal, then locally" if words else "written locally"
    assert f"· {who} ·" in last.figures
    spoken = list(dict.fromkeys(view.spoken for view in views))
    assert ("The story goes on locally." in spoken) == bool(words)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@in_virtual_time
async def test_a_program_gets_the_whole_story_too(case: Case, refused: str) -> None:
    asked = {"prompt": PROMPT, "max_tokens": LENGTH, "seed": 3, "temperature": USUAL.temperature, "top_p": USUAL.top_p}
    async with failing(case, refused) as url, hosted(auto(url)) as service, httpx.AsyncClient(timeout=600) as client:
        answer = await client.post(f"{service}/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["text"] == expected(case.words)
    assert choice["finish_reason"] == "length"
    assert answer.json()["usage"]["completion_tokens"] == LENGTH
    assert answer.json()["served_by"] == "local"


async def whole(line: Line) -> None:
    await line.open()
    await line.words(20)
    await line.end()


@in_virtual_time
async def test_a_story_that_modal_finishes_is_modals_alone() -> None:
    async with broken(whole) as service:
        backend = auto(service.url)
        async with backend.running():
            last = (await read(backend, Form(prompt=PROMPT, max_tokens=LENGTH)))[-1]
            assert backend.local.engine.stats().prompt_tokens == 0
    assert (last.phase, last.generated) == ("ended", text_of(20))
    assert "20 tokens ·" in last.figures
    assert "· written on Modal ·" in last.figures


@pytest.mark.parametrize("missing", ["the usage", "the last event", "nothing but the close"])
@in_virtual_time
async def test_a_story_whose_end_came_is_whole_whatever_is_missing_after_it(missing: str) -> None:
    async def script(line: Line) -> None:
        await line.open()
        await line.words(20)
        await line.event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
        if missing == "the usage":
            await line.event("[DONE]")
        if missing == "nothing but the close":
            await line.closed()

    async with broken(script) as service:
        backend = auto(service.url)
        async with backend.running():
            last = (await read(backend, Form(prompt=PROMPT, max_tokens=LENGTH)))[-1]
            assert backend.modal.breaker.failures == 0
    assert (last.phase, last.generated) == ("ended", text_of(20))
    assert "20 tokens ·" in last.figures


@in_virtual_time
async def test_slow_tokens_are_waited_for_as_long_as_they_come() -> None:
    async def slow(line: Line) -> None:
        await asyncio.sleep(0.3)
        await line.open()
        await asyncio.sleep(0.3)
        await line.words(5, pace=0.3)
        await line.end()

    async with broken(slow) as service:
        backend = auto(service.url)
        async with backend.running():
            last = (await read(backend, Form(prompt=PROMPT, max_tokens=LENGTH)))[-1]
    assert (last.phase, last.generated) == ("ended", text_of(5))
    assert "· written on Modal ·" in last.figures


@in_virtual_time
async def test_where_modal_refuses_and_the_queue_here_is_full_the_user_gets_an_error(refused: str) -> None:
    backend = auto(refused)
    async with backend.running():
        capacity = backend.local.capacity
        streams = [await backend.local.submit(GenerationRequest(prompt="", max_tokens=4000)) for _ in range(capacity)]
        last = (await read(backend, Form(prompt=PROMPT)))[-1]
        for stream in streams:
            stream.cancel()
    assert last.phase == "failed"
    assert "Please try again in about" in last.status
