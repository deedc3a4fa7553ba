"""A headless Firefox, driven by WebDriver BiDi, which it speaks without a driver (https://w3c.github.io/webdriver-bidi/).

Playwright drives a Firefox of its own build only; this is the one that a distribution brings.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

TIMEOUT = 120
"""Seconds that Firefox may take for anything: the machine may be busy."""
LISTENS = re.compile(r"WebDriver BiDi listening on (ws://\S+)")


class Firefox:
    """One tab of it."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.tab = ""

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result. Fails the test where Firefox answers with an error."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(TIMEOUT):
            while (answer := await self._socket.receive_json()).get("id") != number:
                pass
        assert answer["type"] == "success", answer
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, url: str) -> None:
        await self.call("browsingContext.navigate", context=self.tab, url=url, wait="complete")

    async def reload(self) -> None:
        await self.call("browsingContext.reload", context=self.tab, wait="complete")

    async def value(self, expression: str) -> Any:
        """The value of a JavaScript expression, which may be a promise."""
        wrapped = f"(async () => JSON.stringify(await ({expression})) ?? 'null')()"
        target = {"context": self.tab}
        answer = await self.call("script.evaluate", expression=wrapped, target=target, awaitPromise=True)
        assert answer["type"] == "success", answer
        return json.loads(answer["result"]["value"])

    async def until(self, condition: str) -> None:
        """Wait, frame by frame, until a condition in JavaScript holds."""
        # An error ends the wait: thrown in a frame, it would leave the promise open.
        look = f"try {{ ({condition}) ? done(true) : requestAnimationFrame(look) }} catch (error) {{ fail(error) }}"
        assert await self.value(f"new Promise((done, fail) => {{ const look = () => {{ {look} }}; look(); }})")


@contextlib.asynccontextmanager
async def firefox(profile: Path) -> AsyncIterator[Firefox]:
    """Start Firefox with a fresh profile in this folder; skips the test where it is not installed."""
    path = shutil.which("firefox-esr") or shutil.which("firefox")
    if path is None:
        pytest.skip("Firefox is not installed on this machine (Debian package: firefox-esr)")
    options = ["--headless", "--no-remote", "--profile", str(profile), "--remote-debugging-port", "0"]
    process = await asyncio.create_subprocess_exec(
        path, *options, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    drained = None
    try:
        async with asyncio.timeout(TIMEOUT):
            while not (found := LISTENS.search((await process.stderr.readline()).decode(errors="replace"))):
                assert process.returncode is None, "Firefox did not start"
        drained = asyncio.create_task(process.stderr.read())
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{found[1]}/session") as socket:
            browser = Firefox(socket)
            await browser.call("session.new", capabilities={})
            browser.tab = (await browser.call("browsingContext.getTree"))["contexts"][0]["context"]
            yield browser
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        if drained is not None:
            await drained
