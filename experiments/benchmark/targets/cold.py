"""A process that loads the model as the settings say, writes one token, says so and ends: a cold start.

    python -m experiments.benchmark.targets.cold "Once upon a time"

It imports what serving imports and nothing more, so that its start is a server's own.
"""

from __future__ import annotations

import asyncio
import os
import sys


async def first_token(prompt: str) -> None:
    """Print `first` when the first token of a story is there."""
    from model.generation import GenerationRequest
    from model.serving.backend import LocalBackend
    from model.settings import load_settings

    backend = LocalBackend.load(load_settings())
    async with backend.running():
        stream = await backend.submit(GenerationRequest(prompt=prompt, max_tokens=1))
        async for piece in stream:
            if piece.tokens:
                sys.stdout.write("first\n")
                sys.stdout.flush()
        if stream.completion.error is not None:
            raise SystemExit(stream.completion.error)


if __name__ == "__main__":
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    asyncio.run(first_token(sys.argv[1]))
