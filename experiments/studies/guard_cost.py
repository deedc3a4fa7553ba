"""What limits and memory cost a story that is written, and how fast one is that is told again.

    python -m experiments.studies.guard_cost
    python -m experiments.studies.guard_cost --readers 1 16 --stories 64 --rounds 5 --json

Three copies of the service (`python -m model.serving.http`), alike but for their settings: `plain` without limits or
memory, `guarded` with four limits and the memory in the process, and `guarded, redis` with both in a Redis too, left
out where there is no `redis-server`. They take turns, round by round, at the same stories, each of which is new to
them; the ratio to `plain` is taken round by round, and its median counts. `told again` asks the guarded copy for
stories that it knows. Processor time is that of the service alone, so work beside it matters less there than by the
clock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil

from model.errors import StoryError
from model.generation import Chunk, GenerationRequest, SamplingParams
from model.serving.cache.store import CachedResponse, LRUCache, ResponseCache, cache_key
from model.serving.http.address import free_port
from model.serving.rate_limit.limiter import SETTINGS, Limiter, quotas_of
from model.serving.redis import RedisLink

REPOSITORY = Path(__file__).resolve().parents[2]
LIMITS = {
    "STORY_LIMIT_STORIES": "1000000/minute",
    "STORY_LIMIT_TOKENS": "10000000/minute",
    "STORY_LIMIT_ALL_STORIES": "1000000/minute",
    "STORY_LIMIT_ALL_TOKENS": "10000000/minute",
}
"""All four, and none of them ever met."""
TOKENS = 200
"""Of a story at most: a usual one."""


@dataclass(slots=True)
class Round:
    """One target's turn."""

    ttft: list[float] = field(default_factory=list)
    seconds: float = 0.0
    processor: float = 0.0
    """Seconds of the service's own processor time."""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Times are medians, in milliseconds; ratios are to `plain`, in the same rounds."""

    target: str
    readers: int
    stories: int
    ttft: float
    ttft_ratio: float
    tokens_per_second: float
    rate_ratio: float
    processor_per_story: float
    processor_ratio: float


def measure(readers: Sequence[int], stories: int, rounds: int) -> list[Row]:
    """All rows. Raises `StoryError` when a copy of the service does not start or answers with an error."""
    with contextlib.ExitStack() as stack:
        services = {"plain": stack.enter_context(_service({"STORY_CACHE": "false"}))}
        services["guarded"] = stack.enter_context(_service(LIMITS))
        if shutil.which("redis-server"):
            url = stack.enter_context(_redis())
            services["guarded, redis"] = stack.enter_context(_service({**LIMITS, "REDIS_URL": url}))
        rows = []
        seed = 1_000_000
        for count in readers:
            taken: dict[str, list[Round]] = {name: [] for name in [*services, "told again"]}
            for number in range(-1, rounds):  # the first one warms up and does not count
                seeds = [seed + story for story in range(stories)]
                seed += stories
                for name, (address, process) in services.items():
                    turn = asyncio.run(_turn(address, process, count, seeds))
                    if number >= 0:
                        taken[name].append(turn)
                if number >= 0:
                    taken["told again"].append(asyncio.run(_turn(*services["guarded"], count, seeds)))
            rows += [_row(name, count, turns, taken["plain"], stories) for name, turns in taken.items()]
    return rows


def _row(name: str, readers: int, turns: list[Round], plain: list[Round], stories: int) -> Row:
    def ratio(of: Callable[[Round], float]) -> float:
        return statistics.median(of(mine) / of(theirs) for mine, theirs in zip(turns, plain, strict=True))

    def middle(of: Callable[[Round], float]) -> float:
        return statistics.median(of(turn) for turn in turns)

    def ttft(turn: Round) -> float:
        return statistics.median(turn.ttft)

    def rate(turn: Round) -> float:
        return turn.tokens / turn.seconds

    def processor(turn: Round) -> float:
        return turn.processor / len(turn.ttft)

    return Row(
        name,
        readers,
        stories * len(turns),
        middle(ttft) * 1e3,
        ratio(ttft),
        middle(rate),
        ratio(rate),
        middle(processor) * 1e3,
        ratio(processor),
    )


async def parts(url: str | None) -> dict[str, float]:
    """Microseconds of this process's own time for each part, without any HTTP around it; `url`: of a Redis."""
    quotas = [
        quota for name, scope, resource, _ in SETTINGS for quota in quotas_of(LIMITS[name], scope, resource)
    ]
    request = GenerationRequest(prompt="One day, Lily", max_tokens=TOKENS, sampling=SamplingParams(seed=7))
    told = CachedResponse(tuple(Chunk(" word", (number,)) for number in range(TOKENS)), "length", 5, TOKENS)
    stories = ResponseCache(LRUCache(2**24, 3_600), 3_600)
    stories.put(cache_key("edition", request), told)

    async def let_in(limiter: Limiter, times: int, clients: int) -> float:
        began = time.process_time()
        for number in range(times):
            reservation = await limiter.admit(f"client {number % clients}", [request])
            reservation.commit(stories=1)
            reservation.commit(tokens=150)
            reservation.release()
        return (time.process_time() - began) / times * 1e6

    here = Limiter(quotas)
    await let_in(here, 5_000, 5_000)
    found = {"let in and settle, 5,000 clients in memory": await let_in(here, 5_000, 5_000)}
    if url is not None:
        link = RedisLink(url)
        shared = Limiter(quotas, redis=link)
        await let_in(shared, 100, 10)
        found["let in and settle, Redis too"] = await let_in(shared, 1_000, 10)
        await link.aclose()
    began = time.process_time()
    for _ in range(200):
        assert await stories.get(cache_key("edition", request)) is not None
    found[f"find a story of {TOKENS} tokens in memory"] = (time.process_time() - began) / 200 * 1e6
    return found


async def _turn(address: str, process: psutil.Process, readers: int, seeds: list[int]) -> Round:
    """Ask for a story of each seed, `readers` at a time."""
    turn = Round()
    left = list(seeds)

    async def read() -> None:
        while left:
            body = {"prompt": "One day, Lily", "max_tokens": TOKENS, "seed": left.pop(), "stream": True}
            body["stream_options"] = {"include_usage": True}
            began = time.perf_counter()
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise StoryError(f"the service answered with {answer.status_code}")
                first, last = 0.0, ""
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter()
                        last = line
            turn.ttft.append(first - began)
            turn.tokens += json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"]

    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        await client.get("/api/health")
        before, began = _processor(process), time.perf_counter()
        await asyncio.gather(*(read() for _ in range(readers)))
        turn.seconds, turn.processor = time.perf_counter() - began, _processor(process) - before
    return turn


def _processor(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def _service(settings: dict[str, str]) -> Iterator[tuple[str, psutil.Process]]:
    """A copy of the service, its address and its process."""
    order = [sys.executable, "-m", "model.serving.http", "--port", "0", "--drain", "0"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STORY_")}
    with subprocess.Popen(
        order, cwd=REPOSITORY, env={**clean, **settings}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None, "it was asked for"
            told = process.stdout.readline()
            if "http" not in told:
                raise StoryError("a copy of the service did not start")
            yield told.split(": ", 1)[1].strip(), psutil.Process(process.pid)
        finally:
            process.terminate()


@contextlib.contextmanager
def _redis() -> Iterator[str]:
    """A Redis of this run's own, that keeps nothing."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        order = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        with subprocess.Popen(order, stdout=subprocess.DEVNULL) as process:
            try:
                for _ in range(200):
                    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                        break
                    time.sleep(0.05)
                yield f"redis://127.0.0.1:{port}/0"
            finally:
                process.terminate()


def main() -> None:
    """Measure and print, as a table in Markdown or as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 16], help="readers at once")
    parser.add_argument("--stories", type=int, default=48, help="stories of each target in one round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    rows = measure(given.readers, given.stories, given.rounds)
    with _redis() if shutil.which("redis-server") else contextlib.nullcontext() as url:
        alone = asyncio.run(parts(url))
    if given.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "parts": alone}, indent=2))
        return
    print("| target | readers | TTFT ms (ratio) | tokens/s in total (ratio) | processor ms a story (ratio) |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row.target} | {row.readers} | {row.ttft:.1f} ({row.ttft_ratio:.2f}) "
            f"| {row.tokens_per_second:,.0f} ({row.rate_ratio:.2f}) "
            f"| {row.processor_per_story:.1f} ({row.processor_ratio:.2f}) |"
        )
    for name, microseconds in alone.items():
        print(f"{name}: {microseconds:.0f} µs")


if __name__ == "__main__":
    main()
