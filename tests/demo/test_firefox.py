"""The page in Firefox, whose engine lays out initials and streams in its own way."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from demo.handlers import EXAMPLE_NOTE
from tests.demo.firefox import firefox
from tests.demo.scripted import ScriptedBackend
from tests.demo.served import serve
from tests.demo.tabs import IN_A_BROWSER

pytestmark = IN_A_BROWSER
STORY = "Once upon a time, there was a fox."
LETTERS = """(() => {
  const paragraph = document.querySelector('#book .initial');
  const node = [...paragraph.children].map((span) => span.firstChild).find((text) => text?.data);
  const box = (at) => {
    const range = document.createRange();
    range.setStart(node, at);
    range.setEnd(node, at + 1);
    const { left, right, top, bottom } = range.getBoundingClientRect();
    return { left, right, top, bottom };
  };
  return [box(0), box(1)];
})()"""
"""Where the first letter of the story stands, and the one after it."""


async def test_a_story_streams_begins_with_one_large_letter_and_survives_a_reload(tmp_path: Path) -> None:
    hold = threading.Event()
    with serve(ScriptedBackend(STORY, hold=hold)) as served, contextlib.ExitStack() as stack:
        stack.callback(hold.set)  # a stream that waits would keep the app from ending
        async with firefox(tmp_path) as browser:
            await browser.open(served.url)
            await browser.until("document.querySelector('#book article')?.textContent.endsWith('Once')")
            assert await browser.value("document.querySelector('#book .note').textContent") == EXAMPLE_NOTE
            await browser.until("document.querySelector('#write')?.disabled === false")
            await browser.value("document.getElementById('write').click()")
            await browser.until("document.querySelector('#book article')?.textContent === 'Once'")
            assert await browser.value("document.querySelector('#book .book').dataset.phase") == "writing"
            hold.set()
            await browser.until("document.querySelector('#book article')?.textContent.startsWith('Once upon a')")
            await browser.value("document.getElementById('skip').click()")
            await browser.until("document.querySelector('#book .book').dataset.phase === 'ended'")
            assert await browser.value("document.querySelector('#book article').textContent") == STORY
            first, second = await browser.value(LETTERS)
            assert first["bottom"] - first["top"] > 1.5 * (second["bottom"] - second["top"])
            assert 0 <= second["left"] - first["right"] < 0.15 * (first["right"] - first["left"]), "one word"
            await browser.reload()
            await browser.until("document.querySelector('#book .book')?.dataset.phase === 'ended'")
            assert await browser.value("document.querySelector('#book article').textContent") == STORY
