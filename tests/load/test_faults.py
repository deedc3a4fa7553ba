"""What fails around a service in mid-load costs no story. By name only: `make pytest ARGS='-m slow -s tests/load'`."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from experiments.ab.store import connect, endings, exposures
from tests.load.service_process import Readings, read_story, service_process
from tests.postgres_server import postgres_server
from tests.redis_server import redis_server

pytestmark = pytest.mark.slow
CLIENTS = 16
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
DAY = 86_400


async def under_load(url: str, readings: Readings, *happenings: Callable[[], object], pause: float = 3.0) -> None:
    """`CLIENTS` clients that ask for one story after the other, while one thing after the other happens."""
    seeds, over = itertools.count(), False
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def client_loop() -> None:
            while not over:
                await read_story(client, next(seeds), readings)

        clients = [asyncio.create_task(client_loop()) for _ in range(CLIENTS)]
        for happening in happenings:
            await asyncio.sleep(pause)
            await asyncio.to_thread(happening)
        await asyncio.sleep(pause)
        over = True
        await asyncio.gather(*clients)


async def figure(url: str, name: str) -> float:
    """The sum of a metric's lines."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        text = (await client.get("/metrics")).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


async def test_redis_and_the_database_are_killed_and_come_back_and_no_story_and_no_note_is_lost() -> None:
    readings = Readings()
    with redis_server() as redis, postgres_server() as postgres:
        settings = {
            "REDIS_URL": redis.url,
            "DATABASE_URL": postgres.url,
            "STORY_LIMIT_STORIES": "100000/minute",
            "STORY_EXPERIMENTS": "false",
        }
        with service_process("demo", **settings) as app:
            await under_load(
                app.url, readings, redis.stop, lambda: postgres.stop(signal.SIGQUIT), redis.start, postgres.start
            )
            end = time.monotonic() + 60
            while await figure(app.url, "story_events_waiting"):
                assert time.monotonic() < end, "notes still wait for the database"
                await asyncio.sleep(0.5)
            assert await figure(app.url, 'story_events_total{state="lost"}') == 0
            assert app.terminate() == 0
        engine = connect(postgres.url, writes=False)
        with engine.connect() as connection:
            recorded = [
                connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
                for table in (exposures, endings)
            ]
        engine.dispose()
    print(f"\n{readings.stories} stories, {len(readings.errors)} errors; recorded: {recorded}")
    assert readings.errors == []
    assert readings.stories >= CLIENTS
    assert recorded == [readings.stories] * 2


@pytest.mark.skipif(not FAKETIME, reason="libfaketime is not installed (Debian package: libfaketime)")
async def test_a_clock_that_jumps_cuts_no_story_and_forgets_no_limit(tmp_path: Path) -> None:
    """The wall's clock goes a day on, then two days back; what is measured and allowed follows another one."""
    offset = tmp_path / "clock"
    offset.write_text("+0")
    readings = Readings()
    settings = {
        "LD_PRELOAD": str(FAKETIME[0]),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "STORY_LIMIT_STORIES": "60/hour",
        "STORY_CACHE": "false",
    }
    seen: list[float] = []
    async with asyncio.timeout(240):
        with service_process(**settings) as service:
            async with httpx.AsyncClient(base_url=service.url, timeout=120) as client:

                async def allowed() -> bool:
                    asked = {"prompt": "A fox", "max_tokens": 1}
                    answer = await client.post("/api/generate", json=asked)
                    assert answer.status_code in (200, 429)
                    if answer.status_code == 429:
                        assert 0 < int(answer.headers["retry-after"]) <= 3600
                    return answer.status_code == 200

                async def jump(to: str) -> None:
                    offset.write_text(to)
                    asked = {"prompt": "A fox", "max_tokens": 1}
                    stamp = await client.post("/v1/completions", json=asked)
                    if stamp.status_code == 200:
                        seen.append(stamp.json()["created"] - time.time())

                for rounds, to in enumerate(("+0", f"+{DAY}", f"-{DAY}"), 1):
                    running = [asyncio.create_task(read_story(client, seed, readings)) for seed in range(CLIENTS)]
                    while len(readings.ttft) < rounds * CLIENTS:  # all of them are in mid-story
                        await asyncio.sleep(0.01)
                    await jump(to)
                    await asyncio.gather(*running)
                while await allowed():  # what is left of the hour
                    pass
                offset.write_text(f"+{2 * DAY}")
                assert not await allowed(), "a jump forward must not give a new hour"
                offset.write_text(f"-{2 * DAY}")
                assert not await allowed()
                text = (await client.get("/metrics")).text
            assert service.terminate() == 0
    assert [round(shift / DAY) for shift in seen] == [0, 1, -1], "the clock did jump"
    assert readings.errors == []
    assert readings.stories == 3 * CLIENTS
    assert max(readings.ttft + readings.gaps) < 60
    sums = [line for line in text.splitlines() if "_seconds_sum" in line]
    assert sums
    assert all(0 <= float(line.rsplit(" ", 1)[1]) < DAY / 2 for line in sums), sums
