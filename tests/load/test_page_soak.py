"""Sixteen users write on the page while the service is restarted, the connection is cut, and the disk is full.

SOAK_MINUTES=30 .venv/bin/python -m pytest -m slow -s tests/load/test_page_soak.py
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.async_api import Error, Page, TimeoutError, async_playwright

from model.serving.http.server import free_port
from tests.demo.tabs import FLAGS
from tests.load.service_process import ServiceProcess, service_process

pytestmark = pytest.mark.slow

USERS = 16
MINUTES = float(os.environ.get("SOAK_MINUTES", "2"))
NAMES = ("Ember", "Zuri", "Kofi", "Thorvald", "Anouk", "Tim", "Lily", "Mira")
SETTLED = """() => {
  const book = document.querySelector('#book .book'); // absent for a moment, as Gradio reloads after a restart
  const prompt = document.querySelector('#prompt textarea');
  if (!book || !prompt || !document.querySelector('#more > button[aria-expanded]')) return false;
  if (['waiting', 'writing'].includes(book.dataset.phase)) return false;
  const [text, status] = ['article', '.status'].map((part) => book.querySelector(part).textContent);
  return { phase: book.dataset.phase, text, status, prompt: prompt.value };
}"""
"""What the page shows when nothing is written on it."""


@dataclass
class Report:
    """What all users saw together."""

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    """Texts that were on a page, and no longer are."""


@dataclass
class User:
    """One browser tab. `text` is what its page showed last and therefore has to keep."""

    page: Page
    url: str
    number: int
    report: Report
    text: str = ""

    async def open(self) -> None:
        """Open the page, again and again while the service is away; at the first time an example is written there."""
        while True:
            with contextlib.suppress(Error):
                await self.page.goto(self.url, timeout=60_000)
                await self.page.wait_for_selector("#more > button[aria-expanded]", timeout=60_000)
                return
            self.report.counts["page not there"] += 1
            await asyncio.sleep(1)

    async def settled(self, prompt: str) -> dict[str, str]:
        """Wait until nothing is written any more; what was on the page before must still be there, or come back."""
        for patience in range(40, -1, -1):
            try:
                handle = await self.page.wait_for_function(SETTLED, timeout=60_000)
                shown: dict[str, str] = await handle.json_value()
            except Error:  # Gradio reloaded the page in between, or while the service was away: the user reloads it
                self.report.counts["opened again"] += 1
                await self.open()
                continue
            # The last story until the new one's first word; and of that one no word goes.
            begun = self.text if self.text.startswith(prompt) else prompt
            kept = shown["text"] == self.text or shown["text"].startswith(begun)
            if (kept and shown["prompt"] == prompt) or not patience:
                break
            await asyncio.sleep(0.5)  # a reload shows it after a moment
        if shown["prompt"] != prompt or not kept:
            self.report.lost.append(f"user {self.number}, {prompt!r}: {self.text!r} became {shown}")
        return shown

    async def write(self, story: int, rng: random.Random) -> None:
        """Write one story to its end, whatever happens meanwhile, and find it again after a reload."""
        prompt = f"{rng.choice(NAMES)} found box {self.number} of {story}."

        async def begin() -> None:
            await self.page.fill("#prompt textarea", prompt)
            await self.page.click("#write")

        while True:
            await self.on_page(begin)
            await self.skip()
            shown = await self.settled(prompt)
            if shown["text"].startswith(prompt):
                break
            self.report.counts["refused"] += 1
            await asyncio.sleep(1)
        self.text = shown["text"]
        while shown["phase"] != "ended" and "length you set" not in shown["status"]:
            self.report.counts["continued"] += 1
            await asyncio.sleep(1)
            # A story that was given up because nothing came for long may have gone on by itself meanwhile.
            await self.on_page(lambda: self.page.evaluate("document.getElementById('continue').click()"))
            await self.skip()
            shown = await self.settled(prompt)
            self.text = shown["text"]
        self.report.counts["stories"] += 1
        if rng.random() < 0.2:
            await self.open()
            there = "text => document.querySelector('#book article')?.textContent === text"

            async def finds_it() -> None:
                with contextlib.suppress(TimeoutError):
                    await self.page.wait_for_function(there, arg=self.text)
                    return
                self.report.lost.append(f"user {self.number}, after a reload: {self.text!r}")

            await self.on_page(finds_it)
            self.report.counts["reloaded"] += 1

    async def on_page(self, deed: Callable[[], Awaitable[object]]) -> None:
        """Do something on the page; where Gradio reloads it at that moment, do it on the page that was opened again."""
        while True:
            try:
                await deed()
                return
            except Error:
                self.report.counts["opened again"] += 1
                await self.open()

    async def skip(self) -> None:
        """See a word, and skip to the end; a user who has switched the reading pace off has nothing to skip."""
        if self.number % 2:
            with contextlib.suppress(Error):  # refused, or the page is being reloaded
                await self.page.click("#skip", timeout=2_000)

    async def use(self, until: float) -> None:
        """Write stories until then. One half reads as the page proposes and skips, the other has stories at once."""
        rng = random.Random(self.number)
        await self.open()
        if self.number % 2 == 0:
            await self.on_page(lambda: self.page.click("#book .figures summary"))
            await self.on_page(lambda: self.page.uncheck("#book .figures input"))
        story = 0
        while time.monotonic() < until:
            story += 1
            await self.write(story, rng)
            await asyncio.sleep(rng.uniform(1, 4))


async def trouble(users: list[User], services: list[ServiceProcess], restart: contextlib.ExitStack, port: int) -> None:
    """Once in each quarter: a restart that drains, a cut of 3 seconds, a full disk, and a killed service."""
    quarter = MINUTES * 60 / 5

    def start() -> None:
        services.append(restart.enter_context(service_process("demo", port, STORY_SPLIT="default:50,pretrained:50")))

    await asyncio.sleep(quarter)
    assert await asyncio.to_thread(services[-1].terminate) == 0
    await asyncio.to_thread(start)
    await asyncio.sleep(quarter)
    for user in users:
        await user.page.context.set_offline(True)
    await asyncio.sleep(3)
    for user in users:
        await user.page.context.set_offline(False)
    await asyncio.sleep(quarter)
    # No file may grow, as on a full disk.
    unlimited = resource.RLIM_INFINITY
    resource.prlimit(services[-1].process.pid, resource.RLIMIT_FSIZE, (0, unlimited))
    await asyncio.sleep(quarter)
    resource.prlimit(services[-1].process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
    services[-1].process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(services[-1].process.wait, 60)
    await asyncio.to_thread(start)


async def test_no_story_is_lost(tmp_path: Path) -> None:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Chromium is not installed on this machine (Debian package: chromium)")
    report, port = Report(), free_port()
    with contextlib.ExitStack() as stack:
        services = [stack.enter_context(service_process("demo", port, STORY_SPLIT="default:50,pretrained:50"))]
        memory = [services[0].rss_mb]
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=program, args=FLAGS)
            contexts = [await browser.new_context() for _ in range(USERS)]
            users = [
                User(await context.new_page(), services[0].url, number, report)
                for number, context in enumerate(contexts)
            ]
            until = time.monotonic() + MINUTES * 60
            async with asyncio.TaskGroup() as group:
                group.create_task(trouble(users, services, stack, port))
                for user in users:
                    group.create_task(user.use(until))
            await browser.close()
        memory.append(services[-1].rss_mb)
    print(*report.lost, dict(report.counts), sep="\n")
    print(f"memory of the service {memory[0]:.0f} -> {memory[1]:.0f} MB")
    assert report.lost == []
    assert report.counts["stories"] > USERS * MINUTES
