"""The client and its process: real processes throughout. Where a test is about waiting, failing and dying and not about
MLflow, a few lines of Python stand in for it, because they do so at once and on demand.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiments.dashboard.client import StoreClient, UnreadableError, why_absent
from tests.experiments.dashboard.direct import DirectClient
from tests.experiments.dashboard.made import made

STAND_IN = """
import json, os, sys, time
asked = 0
for line in sys.stdin:
    asked += 1
    run = json.loads(line).get("run", "")
    if run == "dies":
        os._exit(3)
    if run == "breaks":
        print("not JSON", flush=True)
        continue
    if run == "fails":
        print(json.dumps({"error": "sqlite:////srv/lily.db is locked"}), flush=True)
        continue
    time.sleep(3600 if run == "hangs" else 0.05)
    samples = {"step": asked, "tokens": os.getpid(), "bits_per_byte": None, "stories": [["A", run]]}
    print(json.dumps({"answer": [samples]}), flush=True)
"""


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A store that looks as if it could be asked."""
    (tmp_path / "mlflow.db").write_bytes(b"not empty")
    return f"sqlite:///{tmp_path}/mlflow.db"


@contextlib.asynccontextmanager
async def reading(uri: str, **options: Any) -> AsyncIterator[StoreClient]:
    client = StoreClient(uri, command=(sys.executable, "-c", STAND_IN), **options)
    async with client.running():
        yield client


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_the_real_process_answers_as_the_store_itself_and_this_one_never_loads_mlflow(repository: Path) -> None:
    store = made().uri
    program = """
import asyncio, json, sys
from experiments.dashboard.client import StoreClient

async def ask():
    client = StoreClient(sys.argv[1], first_timeout=300, timeout=100)
    async with client.running():
        seen = await client.overview()
        curves = await client.curves([run.id for run in seen.runs], "held-out")
        samples = await client.samples(seen.runs[-1].id)
    return [seen, curves, samples]

print(json.dumps(asyncio.run(ask()), default=lambda record: record.model_dump(mode="json")))
heavy = {"mlflow", "torch", "pandas", "sqlalchemy"}
assert not heavy & {name.partition(".")[0] for name in sys.modules}
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, store],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    direct = DirectClient(store)

    async def ask() -> list[Any]:
        seen = await direct.overview()
        curves = await direct.curves([run.id for run in seen.runs], "held-out")
        return [seen, curves, await direct.samples(seen.runs[-1].id)]

    plain = json.loads(json.dumps(asyncio.run(ask()), default=lambda record: record.model_dump(mode="json")))
    assert json.loads(run.stdout) == plain


def test_identical_concurrent_questions_are_coalesced(uri: str) -> None:
    async def go() -> None:
        async with reading(uri, ttl=3600) as client:
            answers = await asyncio.gather(*(client.samples("a") for _ in range(40)))
            assert {answer[0].step for answer in answers} == {1}
            assert (await client.samples("a"))[0].step == 1, "still cached"
            assert (await client.samples("b"))[0].step == 2
            client._ttl = 0.0  # an hour later
            assert (await client.samples("a"))[0].step == 3, "asked again"

    asyncio.run(go())


def test_a_user_who_disconnects_takes_no_answer_from_another(uri: str) -> None:
    async def go() -> None:
        async with reading(uri) as client:
            one = asyncio.create_task(client.samples("a"))
            other = asyncio.create_task(client.samples("a"))
            await asyncio.sleep(0.01)
            one.cancel()
            assert (await other)[0].step == 1

    asyncio.run(go())


def test_a_store_that_does_not_answer_is_an_error_in_time_and_the_process_is_replaced(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def go() -> None:
        async with reading(uri, timeout=0.3, first_timeout=20) as client:
            first = await client.samples("a")
            hung = client.pid
            with pytest.raises(UnreadableError, match=r"does not answer; please try again"):
                await client.samples("hangs")  # for ever, if it were left alone
            assert hung == first[0].tokens
            assert gone(hung)
            assert (await client.samples("b"))[0].tokens != hung

    asyncio.run(go())
    assert "no answer in time" in caplog.text


@pytest.mark.parametrize("end", ["dies", "breaks"])
def test_a_process_that_ends_or_writes_nonsense_is_replaced(uri: str, end: str) -> None:
    async def go() -> None:
        async with reading(uri) as client:
            before = (await client.samples("a"))[0].tokens
            with pytest.raises(UnreadableError, match="does not answer"):
                await client.samples(end)
            assert (await client.samples("b"))[0].tokens != before

    asyncio.run(go())


def test_a_killed_process_is_replaced_unnoticed(uri: str) -> None:
    async def go() -> None:
        async with reading(uri) as client:
            before = (await client.samples("a"))[0].tokens
            os.kill(before, signal.SIGKILL)
            while client._process is not None and client._process.returncode is None:
                await asyncio.sleep(0.01)
            assert (await client.samples("b"))[0].tokens != before

    asyncio.run(go())


def test_an_error_goes_to_the_log_and_not_to_the_user(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        async with reading(uri) as client:
            with pytest.raises(UnreadableError) as caught:
                await client.samples("fails")
            assert "lily" not in str(caught.value)
            assert (await client.samples("a"))[0].step == 2, "the process goes on"

    with caplog.at_level(logging.WARNING):
        asyncio.run(go())
    assert "lily.db is locked" in caplog.text


def test_too_many_questions_are_refused(uri: str) -> None:
    async def go() -> None:
        async with reading(uri) as client:
            asked = [asyncio.create_task(client.samples(str(number))) for number in range(40)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, UnreadableError)]
            assert len(refused) == 8
            assert "Many are looking" in str(refused[0])

    asyncio.run(go())


def test_an_idle_process_is_ended_and_a_later_question_starts_another(uri: str) -> None:
    async def go() -> None:
        async with reading(uri, idle_timeout=0.1, ttl=0.0) as client:
            before = (await client.samples("a"))[0].tokens
            async with asyncio.timeout(20):
                while client.pid is not None or not gone(before):
                    await asyncio.sleep(0.02)
            assert (await client.samples("a"))[0].tokens != before

    asyncio.run(go())


def test_it_ends_with_the_app_however_the_app_ends(uri: str, repository: Path) -> None:
    async def go() -> int:
        async with reading(uri) as client:
            return (await client.samples("a"))[0].tokens

    assert gone(asyncio.run(go()))
    program = f"""
import asyncio, os, signal, sys
from experiments.dashboard.client import StoreClient

async def go():
    client = StoreClient({uri!r}, command=(sys.executable, "-c", {STAND_IN!r}))
    print((await client.samples("a"))[0].tokens, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(go())
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL
    pid, end = int(run.stdout), time.monotonic() + 10
    while not gone(pid):
        assert time.monotonic() < end, "the process that reads outlived the app"
        time.sleep(0.02)


def test_a_missing_store_is_one_line_and_is_not_created(tmp_path: Path) -> None:
    async def go() -> None:
        for uri in (f"sqlite:///{tmp_path}/nowhere/mlflow.db", "sqlite:///mlflow.db"):
            async with reading(uri) as client:
                with pytest.raises(UnreadableError, match=r"`story train` fills it"):
                    await client.overview()
                assert client.pid is None

    asyncio.run(go())
    assert list(tmp_path.iterdir()) == []


def test_missing_mlflow_is_one_line(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pretended, because the tests need MLflow themselves.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = why_absent(uri)
    assert line is not None
    assert line.startswith("MLflow, which keeps the experiments, is not installed here")
    assert "\n" not in line
