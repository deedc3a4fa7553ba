"""Merge chunks of a story so that the page is redrawn about twenty times a second, not once a token.

Each update of a page costs a message, a diff and a redraw. The first chunk passes at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from model.generation import Chunk, merge_chunks

INTERVAL = 0.05
"""Seconds between two merged chunks: 20 redraws a second look like a steady flow."""

IDLE = 0.5
"""Seconds without a chunk after which an empty one is passed on."""


async def coalesce(
    chunks: AsyncIterator[Chunk], *, interval: float = INTERVAL, idle: float = IDLE
) -> AsyncGenerator[Chunk, None]:
    """Pass on `chunks`, the first at once and later ones merged over `interval` seconds.

    What has gathered when the source ends is passed on at once, before an error of the source is raised. While the
    source is silent, an empty chunk comes every `idle` seconds, so that the consumer can notice that its client is
    gone. Closing this generator cancels the task that reads `chunks`.
    """
    gathered: list[Chunk] = []
    arrived = asyncio.Event()

    async def pump() -> None:
        try:
            async for chunk in chunks:
                gathered.append(chunk)
                arrived.set()
        finally:
            arrived.set()

    source = asyncio.create_task(pump())
    try:
        while not source.done() or gathered:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(arrived.wait(), idle)
            arrived.clear()
            if gathered or not source.done():
                merged = merge_chunks(gathered)
                gathered.clear()
                yield merged
            if not source.done():
                # Wakes early when the source ends, so that a short story is not held back to the next beat.
                await asyncio.wait({source}, timeout=interval)
        await source
    finally:
        source.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await source
