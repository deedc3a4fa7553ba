"""The process that reads: real processes throughout. Where a test is about waiting, failing and dying and not about
MLflow, a few lines of Python stand in for it, because they do so at once and when they are told to.
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

from experiments.dashboard.absent import why_absent
from experiments.dashboard.reader import StoreReader, UnreadableError
from tests.experiments.dashboard.direct import DirectReader
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
    time.sleep(30 if run == "hangs" else 0.05)
    moment = {"step": asked, "tokens": os.getpid(), "bits_per_byte": None, "stories": [["A", run]]}
    print(json.dumps({"answer": [moment]}), flush=True)
"""


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A store that looks as if it could be asked."""
    (tmp_path / "mlflow.db").write_bytes(b"not empty")
    return f"sqlite:///{tmp_path}/mlflow.db"


@contextlib.asynccontextmanager
async def reading(uri: str, **options: Any) -> AsyncIterator[StoreReader]:
    reader = StoreReader(uri, command=(sys.executable, "-c", STAND_IN), **options)
    async with reader.running():
        yield reader


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_real_process_answers_as_the_store_itself_and_this_one_never_loads_mlflow(
    repository: Path,
) -> None:
    store = made().uri
    program = """
import asyncio, json, sys
from experiments.dashboard.reader import StoreReader
from experiments.dashboard.records import as_plain

async def ask():
    reader = StoreReader(sys.argv[1], first_patience=300, patience=100)
    async with reader.running():
        seen = await reader.overview()
        curves = await reader.curves([run.id for run in seen.runs], "held-out")
        moments = await reader.moments(seen.runs[-1].id)
    return [as_plain(seen), list(map(as_plain, curves)), list(map(as_plain, moments))]

print(json.dumps(asyncio.run(ask())))
heavy = {"mlflow", "torch", "pandas", "sqlalchemy"}
assert not heavy & {name.partition(".")[0] for name in sys.modules}
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, store],
        cwd=repository, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    direct = DirectReader(store)

    async def ask() -> list[Any]:
        seen = await direct.overview()
        curves = await direct.curves([run.id for run in seen.runs], "held-out")
        return [seen, curves, await direct.moments(seen.runs[-1].id)]

    seen, curves, moments = asyncio.run(ask())
    plain = json.loads(json.dumps([seen, curves, moments], default=lambda record: _plain(record)))
    assert json.loads(run.stdout) == plain


def _plain(record: Any) -> Any:
    from experiments.dashboard.records import as_plain

    return as_plain(record)


def test_the_same_question_is_asked_once_however_many_ask_it(uri: str) -> None:
    async def go() -> None:
        async with reading(uri, fresh=0.4) as reader:
            answers = await asyncio.gather(*(reader.moments("a") for _ in range(40)))
            assert {answer[0].step for answer in answers} == {1}
            assert (await reader.moments("a"))[0].step == 1, "still fresh"
            assert (await reader.moments("b"))[0].step == 2
            await asyncio.sleep(0.45)
            assert (await reader.moments("a"))[0].step == 3, "asked again"

    asyncio.run(go())


def test_a_visitor_who_goes_away_takes_no_answer_from_another(uri: str) -> None:
    async def go() -> None:
        async with reading(uri) as reader:
            one = asyncio.create_task(reader.moments("a"))
            other = asyncio.create_task(reader.moments("a"))
            await asyncio.sleep(0.01)
            one.cancel()
            assert (await other)[0].step == 1

    asyncio.run(go())


def test_a_store_that_does_not_answer_is_told_in_time_and_asked_afresh(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def go() -> None:
        async with reading(uri, patience=0.3, first_patience=20) as reader:
            first = await reader.moments("a")
            hung = reader.pid
            began = time.monotonic()
            with pytest.raises(UnreadableError, match=r"does not answer; please try again"):
                await reader.moments("hangs")
            assert time.monotonic() - began < 5
            assert hung == first[0].tokens
            assert gone(hung)
            assert (await reader.moments("b"))[0].tokens != hung

    asyncio.run(go())
    assert "no answer in time" in caplog.text


@pytest.mark.parametrize("end", ["dies", "breaks"])
def test_a_process_that_ends_or_babbles_is_replaced(uri: str, end: str) -> None:
    async def go() -> None:
        async with reading(uri) as reader:
            before = (await reader.moments("a"))[0].tokens
            with pytest.raises(UnreadableError, match="does not answer"):
                await reader.moments(end)
            assert (await reader.moments("b"))[0].tokens != before

    asyncio.run(go())


def test_one_that_was_killed_from_outside_is_replaced_unnoticed(uri: str) -> None:
    async def go() -> None:
        async with reading(uri) as reader:
            before = (await reader.moments("a"))[0].tokens
            os.kill(before, signal.SIGKILL)
            while reader._process is not None and reader._process.returncode is None:
                await asyncio.sleep(0.01)
            assert (await reader.moments("b"))[0].tokens != before

    asyncio.run(go())


def test_what_went_wrong_goes_to_the_log_and_not_to_a_visitor(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def go() -> None:
        async with reading(uri) as reader:
            with pytest.raises(UnreadableError) as told:
                await reader.moments("fails")
            assert "lily" not in str(told.value)
            assert (await reader.moments("a"))[0].step == 2, "the process goes on"

    with caplog.at_level(logging.WARNING):
        asyncio.run(go())
    assert "lily.db is locked" in caplog.text


def test_a_crowd_is_turned_away_instead_of_waiting_for_ever(uri: str) -> None:
    async def go() -> None:
        async with reading(uri) as reader:
            asked = [asyncio.create_task(reader.moments(str(number))) for number in range(40)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, UnreadableError)]
            assert len(refused) == 8
            assert "Many are looking" in str(refused[0])

    asyncio.run(go())


def test_without_questions_the_process_is_dismissed_and_a_later_one_starts_it_again(uri: str) -> None:
    async def go() -> None:
        async with reading(uri, idle=0.1, fresh=0.0) as reader:
            before = (await reader.moments("a"))[0].tokens
            async with asyncio.timeout(20):
                while reader.pid is not None or not gone(before):
                    await asyncio.sleep(0.02)
            assert (await reader.moments("a"))[0].tokens != before

    asyncio.run(go())


def test_it_ends_with_the_app_however_the_app_ends(uri: str, repository: Path) -> None:
    async def go() -> int:
        async with reading(uri) as reader:
            return (await reader.moments("a"))[0].tokens

    assert gone(asyncio.run(go()))
    program = f"""
import asyncio, os, signal, sys
from experiments.dashboard.reader import StoreReader

async def go():
    reader = StoreReader({uri!r}, command=(sys.executable, "-c", {STAND_IN!r}))
    print((await reader.moments("a"))[0].tokens, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(go())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=False
    )
    assert run.returncode == -signal.SIGKILL
    pid, end = int(run.stdout), time.monotonic() + 10
    while not gone(pid):
        assert time.monotonic() < end, "the process that reads outlived the app"
        time.sleep(0.02)


def test_where_there_is_no_store_it_is_said_in_a_line_and_nothing_is_made(tmp_path: Path) -> None:
    async def go() -> None:
        for uri in (f"sqlite:///{tmp_path}/nowhere/mlflow.db", "sqlite:///mlflow.db"):
            async with reading(uri) as reader:
                with pytest.raises(UnreadableError, match=r"`story train` fills it"):
                    await reader.overview()
                assert reader.pid is None

    asyncio.run(go())
    assert list(tmp_path.iterdir()) == []


def test_without_mlflow_it_is_said_in_a_line(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pretended, because the tests need MLflow themselves.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = why_absent(uri)
    assert line is not None
    assert line.startswith("MLflow, which keeps the experiments, is not installed here")
    assert "\n" not in line
