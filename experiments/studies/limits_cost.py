"""What rate limiting and the response cache cost a request that is generated, and how fast a cached one is.

    python -m experiments.studies.limits_cost
    python -m experiments.studies.limits_cost --clients 1 16 --stories 64 --rounds 5 --json

Three copies of the service, alike but for their settings: `plain` without limits or cache, `limits and cache` with four
limits and the cache in the process, and `limits and cache, Redis` with both in a Redis too, left out where there is no
`redis-server`. They take turns at the same requests, each of which is new to them. `cached` asks the second copy for
stories that it has in its cache. Processor time is that of the service alone, so work beside it matters less there than
by the clock. Ratios are to `plain` in the same rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import psutil

from experiments.studies.rounds import Figures, Turn, compare, options, print_rows, running_service, stream_story
from model.generation import Chunk, GenerationRequest, SamplingParams
from model.serving import http
from model.serving.cache.store import CachedResponse, LRUCache, ResponseCache, cache_key
from model.serving.http.address import free_port
from model.serving.rate_limit import SETTINGS, Limiter, quotas_of
from model.serving.redis import RedisLink

LIMITS = {
    "STORY_LIMIT_STORIES": "1000000/minute",
    "STORY_LIMIT_TOKENS": "10000000/minute",
    "STORY_LIMIT_ALL_STORIES": "1000000/minute",
    "STORY_LIMIT_ALL_TOKENS": "10000000/minute",
}
"""All four, and none is ever reached."""
PROMPT, TOKENS = "One day, Lily", 200
FIGURES: Figures = {
    "ttft_ms": lambda turn: statistics.median(turn.ttft) * 1e3,
    "tokens_per_second": lambda turn: turn.rate,
    "cpu_ms_per_story": lambda turn: turn.cpu / len(turn.ttft) * 1e3,
}


def measure(clients: Sequence[int], stories: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each number of clients and target. Raises `StoryError` when a service fails."""
    with contextlib.ExitStack() as stack:

        def service(settings: dict[str, str]) -> tuple[str, psutil.Process]:
            arguments = ["-m", http.__name__, "--port", "0", "--drain", "0"]
            return stack.enter_context(running_service(arguments, settings))

        services = {"plain": service({"STORY_CACHE": "false"}), "limits and cache": service(LIMITS)}
        if shutil.which("redis-server"):
            url = stack.enter_context(_redis())
            services["limits and cache, Redis"] = service({**LIMITS, "REDIS_URL": url})
        services["cached"] = services["limits and cache"]
        rows = []
        seed = 1_000_000
        for count in clients:
            turns: dict[str, list[Turn]] = {name: [] for name in services}
            for _ in range(rounds + 1):
                seeds = range(seed, seed + stories)
                seed += stories
                for name, (address, process) in services.items():
                    turns[name].append(asyncio.run(_turn(address, process, count, seeds)))
            for name, taken in turns.items():  # the first round warms up and does not count
                figures = compare(taken[1:], turns["plain"][1:], FIGURES)
                rows.append({"target": name, "clients": count, "stories": stories * rounds, **figures})
    return rows


async def parts(url: str | None) -> dict[str, float]:
    """Return microseconds of this process's own time for each part, without HTTP; `url`: of a Redis."""
    quotas = [quota for name, scope, resource, _ in SETTINGS for quota in quotas_of(LIMITS[name], scope, resource)]
    request = GenerationRequest(prompt=PROMPT, max_tokens=TOKENS, sampling=SamplingParams(seed=7))
    chunks = tuple(Chunk(" word", (number,)) for number in range(TOKENS))
    cache = ResponseCache(LRUCache(2**24, 3_600), 3_600)
    cache.put(cache_key("fingerprint", request), CachedResponse(chunks, "length", 5, TOKENS))

    async def admit(limiter: Limiter, times: int, clients: int) -> float:
        began = time.process_time()
        for number in range(times):
            reservation = await limiter.admit(f"client {number % clients}", [request])
            reservation.commit(stories=1)
            reservation.commit(tokens=150)
            reservation.release()
        return (time.process_time() - began) / times * 1e6

    local = Limiter(quotas)
    await admit(local, 5_000, 5_000)
    found = {"reserve and settle, 5,000 clients in memory": await admit(local, 5_000, 5_000)}
    if url is not None:
        link = RedisLink(url)
        shared = Limiter(quotas, redis=link)
        await admit(shared, 100, 10)
        found["reserve and settle, Redis too"] = await admit(shared, 1_000, 10)
        await link.aclose()
    began = time.process_time()
    for _ in range(200):
        assert await cache.get(cache_key("fingerprint", request)) is not None
    found[f"look up a cached story of {TOKENS} tokens"] = (time.process_time() - began) / 200 * 1e6
    return found


async def _turn(address: str, process: psutil.Process, clients: int, seeds: Sequence[int]) -> Turn:
    """Request a story of each seed, `clients` at a time."""
    turn, left = Turn(), list(seeds)

    async def request() -> None:
        while left:
            await stream_story(client, turn, PROMPT, TOKENS, left.pop())

    def cpu() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        await client.get("/api/health")
        before, began = cpu(), time.perf_counter()
        await asyncio.gather(*(request() for _ in range(clients)))
        turn.seconds, turn.cpu = time.perf_counter() - began, cpu() - before
    return turn


@contextlib.contextmanager
def _redis() -> Iterator[str]:
    """Run a Redis that stores nothing on disk; yield its URL."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                for _ in range(200):
                    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                        break
                    time.sleep(0.05)
                yield f"redis://127.0.0.1:{port}/0"
            finally:
                process.terminate()


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16], help="concurrent clients")
    parser.add_argument("--stories", type=int, default=48, help="stories of each target in one round")
    given = parser.parse_args()
    rows = measure(given.clients, given.stories, given.rounds)
    with _redis() if shutil.which("redis-server") else contextlib.nullcontext() as url:
        alone = asyncio.run(parts(url))
    if given.json:
        print(json.dumps({"rows": rows, "parts": alone}, indent=2))
        return
    print_rows(rows)
    print_rows([{"part": name, "microseconds": value} for name, value in alone.items()])


if __name__ == "__main__":
    main()
