"""Socket.IO as the earlier system's clients speak it: the real client over a socket, and by hand over polling."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import socketio

from model.serving.backend import LocalBackend
from tests.model.serving.http.serving import Running, paced, serving


class Listener:
    """A connected client and all that it received."""

    def __init__(self) -> None:
        self.client = socketio.AsyncClient(reconnection=False)
        self.received: list[tuple[str, Any]] = []
        self.news = asyncio.Event()
        for name in ("story_token", "story_complete", "story_error"):
            self.client.on(name, self._hears(name))

    def _hears(self, name: str) -> Any:
        async def hear(data: Any) -> None:
            self.received.append((name, data))
            self.news.set()

        return hear

    async def until(self, *names: str) -> Any:
        """The data of the next event of one of these names, from the beginning on."""
        async with asyncio.timeout(20):
            while True:
                found = [data for name, data in self.received if name in names]
                if found:
                    return found[-1]
                self.news.clear()
                await self.news.wait()


@contextlib.asynccontextmanager
async def listening(running: Running) -> AsyncIterator[Listener]:
    listener = Listener()
    await listener.client.connect(running.url, transports=["websocket"])
    try:
        yield listener
    finally:
        await listener.client.disconnect()


async def free(backend: LocalBackend) -> None:
    async with asyncio.timeout(10):
        while backend.engine.stats().active:
            await asyncio.sleep(0.005)


ASKED = {"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0.5, "seed": 4}


async def test_a_story_is_sent_token_by_token_and_then_whole(shipped: Running) -> None:
    async with listening(shipped) as listener:
        await listener.client.emit("generate_story", ASKED)
        complete = await listener.until("story_complete", "story_error")
    tokens = [data for name, data in listener.received if name == "story_token"]
    assert "".join(token["text"] for token in tokens) == complete["text"]
    assert {token["id"] for token in tokens} == {complete["id"]}
    whole = shipped.post("/api/generate", **ASKED).json()
    assert complete["story"] == whole["story"]
    assert complete["usage"] == whole["usage"]


def test_a_client_that_only_polls_gets_the_same(shipped: Running) -> None:
    """By hand, for the library's own polling client takes 30 s to leave any server."""

    def poll(send: str = "") -> list[str]:
        if send:
            assert shipped.client.post(address, content=send).text == "OK"
            return []
        return shipped.client.get(address).text.split("\x1e")

    address = "/socket.io/?EIO=4&transport=polling"
    (opening,) = poll()
    address += f"&sid={json.loads(opening[1:])['sid']}"
    poll("40")
    assert poll()[0].startswith("40")
    poll("42" + json.dumps(["generate_story", ASKED]))
    received: list[Any] = []
    while not received or received[-1][0] == "story_token":
        received += [json.loads(packet[2:]) for packet in poll() if packet.startswith("42")]
    poll("1")
    assert received[-1][0] == "story_complete"
    assert "".join(data["text"] for _, data in received[:-1]) == received[-1][1]["text"]


async def test_what_is_wrong_is_a_story_error_and_the_next_story_goes_on(shipped: Running) -> None:
    async with listening(shipped) as listener:
        for asked, param in (({"prompt": "x", "temperature": 9}, "temperature"), ("x", None), (None, None)):
            listener.received.clear()
            await listener.client.emit("generate_story", asked)
            error = (await listener.until("story_error"))["error"]
            assert error["param"] == param
            assert error.keys() == {"type", "message", "param", "code"}
        await listener.client.emit("generate_story", {"prompt": "x", "max_tokens": 3})
        assert (await listener.until("story_complete"))["finish_reason"] == "length"


async def test_a_story_can_be_stopped_and_is_then_complete_as_cancelled() -> None:
    backend, _ = paced(step_seconds=0.01)
    with serving(backend) as running:
        async with listening(running) as listener:
            await listener.client.emit("generate_story", {"prompt": "Once", "max_tokens": 4000})
            await listener.until("story_token")
            await listener.client.emit("generate_story", {"prompt": "Two"})
            assert (await listener.until("story_error"))["error"]["code"] == "story_running"
            await listener.client.emit("stop_story")
            complete = await listener.until("story_complete")
            assert complete["finish_reason"] == "cancelled"
            assert complete["text"]
            await free(backend)


async def test_a_client_that_goes_away_takes_its_story_with_it() -> None:
    backend, _ = paced(step_seconds=0.01)
    with serving(backend) as running:
        async with listening(running) as listener:
            await listener.client.emit("generate_story", {"prompt": "Once", "max_tokens": 4000})
            await listener.until("story_token")
            assert backend.engine.stats().active == 1
        await free(backend)
        assert backend.engine.stats().finished["cancelled"] == 1


async def test_when_the_service_ends_the_running_story_finishes_first() -> None:
    backend, _ = paced(step_seconds=0.01)
    with serving(backend, drain=20) as running:
        async with listening(running) as listener:
            await listener.client.emit("generate_story", {"prompt": "Once", "max_tokens": 40})
            await listener.until("story_token")
            running.server.handle_exit(15, None)
            complete = await listener.until("story_complete", "story_error")
            assert complete["finish_reason"] == "length"


async def test_a_full_queue_is_a_story_error() -> None:
    backend, _ = paced(slots=1, queue=0, step_seconds=0.01)
    with serving(backend) as running:
        async with listening(running) as first, listening(running) as second:
            await first.client.emit("generate_story", {"prompt": "Once", "max_tokens": 4000})
            await first.until("story_token")
            await second.client.emit("generate_story", {"prompt": "Two"})
            assert (await second.until("story_error"))["error"]["code"] == "queue_full"
