"""Load and faults on a service in a process of its own. By name only: `make pytest ARGS='-m slow -s tests/load'`.

Figures are printed, and kept in experiments/LOG.md; what is asserted holds on a busy machine too.
"""

from __future__ import annotations

import asyncio
import itertools
import time

import httpx
import pytest

from tests.load.service_process import Readings, ServiceProcess, read_story, service_process

pytestmark = pytest.mark.slow
STREAMS = 64
SECONDS = 120
CAPACITY = {"STORY_SLOTS": "64", "STORY_QUEUE": "64", "STORY_CACHE": "false"}


def client_of(service: ServiceProcess) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=service.url, timeout=120, limits=limits)


async def test_64_streams_for_two_minutes_without_an_error_in_flat_memory() -> None:
    readings, memory = Readings(), []
    seeds = itertools.count()
    with service_process(**CAPACITY) as service:
        async with client_of(service) as client:
            end = time.monotonic() + SECONDS

            async def client_loop() -> None:
                while time.monotonic() < end:
                    await read_story(client, next(seeds), readings)

            async def watch() -> None:
                while time.monotonic() < end:
                    await asyncio.sleep(2)
                    memory.append(service.rss_mb)

            began = time.monotonic()
            await asyncio.gather(watch(), *(client_loop() for _ in range(STREAMS)))
            took = time.monotonic() - began
        assert service.terminate() == 0
    early, late = max(memory[5 : len(memory) // 2]), max(memory[len(memory) // 2 :])
    print(
        f"\n{STREAMS} streams, {took:.0f} s: {readings.stories} stories, {len(readings.errors)} errors, "
        f"{readings.tokens / took:.0f} tokens/s; TTFT p50/p99 {readings.quantile(readings.ttft, 0.5) * 1e3:.0f}/"
        f"{readings.quantile(readings.ttft, 0.99) * 1e3:.0f} ms; between tokens p50/p99 "
        f"{readings.quantile(readings.gaps, 0.5) * 1e3:.1f}/{readings.quantile(readings.gaps, 0.99) * 1e3:.1f} ms; "
        f"memory {early:.0f} MB in the first half, {late:.0f} MB in the second"
    )
    assert readings.errors == []
    assert readings.stories >= STREAMS
    assert late < 1.02 * early + 2
    assert late < 1_000, "the documented instance has a gigabyte"


async def test_clients_who_vanish_and_slow_ones_cost_the_others_nothing() -> None:
    """Of 48 clients a third disconnects in mid-story and a third reads slowly; the rest gets every story whole."""
    vanished, slow, steady = Readings(), Readings(), Readings()
    with service_process(**CAPACITY) as service:
        async with client_of(service) as client, asyncio.timeout(180):

            async def leave(seed: int) -> None:
                reading = asyncio.create_task(read_story(client, seed, vanished))
                await asyncio.sleep(0.05 + seed % 7 / 20)
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

            await asyncio.gather(
                *(leave(seed) for seed in range(16)),
                *(read_story(client, 100 + seed, slow, pause=0.02) for seed in range(16)),
                *(read_story(client, 200 + seed, steady) for seed in range(16)),
            )
            health = (await client.get("/api/health")).json()
        assert health["engine"]["active"] == 0
        assert health["open"] == 0
        assert service.terminate() == 0
    assert (steady.stories, steady.errors) == (16, [])
    assert (slow.stories, slow.errors) == (16, [])


async def test_sigterm_under_load_loses_no_running_story() -> None:
    readings = Readings()
    with service_process(**CAPACITY, STORY_DRAIN="60") as service:
        async with client_of(service) as client:
            running = [asyncio.create_task(read_story(client, seed, readings)) for seed in range(STREAMS)]
            while len(readings.ttft) < STREAMS:  # all of them are in mid-story
                await asyncio.sleep(0.01)
            exit_code = asyncio.create_task(asyncio.to_thread(service.terminate))
            await asyncio.gather(*running)
            assert await exit_code == 0
    assert (readings.stories, readings.errors) == (STREAMS, [])


async def test_a_soak_of_two_thousand_stories_leaves_memory_where_it_was() -> None:
    readings, memory = Readings(), []
    seeds = iter(range(2_000))
    with service_process(**CAPACITY) as service:
        async with client_of(service) as client:

            async def client_loop() -> None:
                for seed in seeds:
                    await read_story(client, seed, readings)
                    if seed % 100 == 99:
                        memory.append(service.rss_mb)

            await asyncio.gather(*(client_loop() for _ in range(16)))
        assert service.terminate() == 0
    print(
        f"\n{readings.stories} stories, {readings.tokens:,} tokens; memory by hundreds: "
        + " ".join(f"{mb:.0f}" for mb in memory)
    )
    assert (readings.stories, readings.errors) == (2_000, [])
    assert memory[-1] < 1.02 * memory[4] + 2
