"""Gather a story's events so that the page is redrawn about twenty times a second, not once a token.

Each update of a page costs a message, a diff and a redraw. The first event passes at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

INTERVAL = 0.05
"""Seconds between two lists: 20 redraws a second look like a steady flow."""

T = TypeVar("T")


async def coalesce(items: AsyncIterator[T], *, interval: float = INTERVAL) -> AsyncGenerator[list[T], None]:
    """Pass on `items` in lists, the first item at once and later ones as they gather over `interval` seconds.

    What has gathered when the source ends is passed on at once, before an error of the source is raised. Closing this
    generator cancels the task that reads `items`.
    """
    gathered: list[T] = []
    arrived = asyncio.Event()

    async def pump() -> None:
        try:
            async for item in items:
                gathered.append(item)
                arrived.set()
        finally:
            arrived.set()

    source = asyncio.create_task(pump())
    try:
        while not source.done() or gathered:
            await arrived.wait()
            arrived.clear()
            if gathered:
                batch = gathered.copy()
                gathered.clear()
                yield batch
            if not source.done():
                # Wakes early when the source ends, so that a short story is not held back to the next beat.
                await asyncio.wait({source}, timeout=interval)
        await source
    finally:
        source.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await source
