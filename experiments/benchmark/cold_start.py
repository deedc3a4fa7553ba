"""A cold start: a process that loads the model of the settings, generates one token, reports it and ends.

    python -m experiments.benchmark.cold_start "Once upon a time"

It imports only what serving imports, so its start takes as long as a server's.
"""

import asyncio
import os
import sys


async def first_token(prompt: str) -> None:
    """Print `first` when the first token has arrived."""
    from model.generation import GenerationRequest
    from model.serving.backend import LocalBackend
    from model.settings import load_settings

    backend = LocalBackend.load(load_settings())
    async with backend.running():
        stream = await backend.submit(GenerationRequest(prompt=prompt, max_tokens=1))
        async for chunk in stream:
            if chunk.tokens:
                sys.stdout.write("first\n")
                sys.stdout.flush()
        if stream.completion.error is not None:
            raise SystemExit(stream.completion.error)


if __name__ == "__main__":
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    asyncio.run(first_token(sys.argv[1]))
