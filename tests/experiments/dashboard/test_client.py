"""The client and its process: real processes throughout. Where a test is about waiting, failing and dying and not about
MLflow, `stand_in` stands in for it, because it does so at once and on demand.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.exceptions import MlflowException

from experiments.dashboard import client
from experiments.dashboard.client import StoreClient, UnreadableError, answer, why_absent
from experiments.dashboard.rows import run_rows
from model.errors import InputError
from tests.experiments.dashboard import stand_in
from tests.experiments.dashboard.direct import DirectClient
from tests.experiments.dashboard.made import made
from training.tracking.store import open_store


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A store that looks as if it could be asked."""
    (tmp_path / "mlflow.db").write_bytes(b"not empty")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(autouse=True)
def _without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ask", stand_in.ask)


@contextlib.asynccontextmanager
async def reading(uri: str, **options: Any) -> AsyncIterator[StoreClient]:
    store = StoreClient(uri, **options)
    async with store.running():
        yield store


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
        async with reading(uri, ttl=3600) as store:
            answers = await asyncio.gather(*(store.samples("a") for _ in range(40)))
            assert {answer[0].step for answer in answers} == {1}
            assert (await store.samples("a"))[0].step == 1, "still cached"
            assert (await store.samples("b"))[0].step == 2
            store._ttl = 0.0  # an hour later
            assert (await store.samples("a"))[0].step == 3, "asked again"

    asyncio.run(go())


def test_a_user_who_disconnects_takes_no_answer_from_another(uri: str) -> None:
    async def go() -> None:
        async with reading(uri) as store:
            one = asyncio.create_task(store.samples("a"))
            other = asyncio.create_task(store.samples("a"))
            await asyncio.sleep(0.01)
            one.cancel()
            assert (await other)[0].step == 1

    asyncio.run(go())


def test_a_store_that_does_not_answer_is_an_error_in_time_and_the_process_is_replaced(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def go() -> None:
        async with reading(uri, timeout=0.3, first_timeout=20) as store:
            hung = (await store.samples("a"))[0].tokens
            with pytest.raises(UnreadableError, match=r"does not answer; please try again"):
                await store.samples("hangs")  # for ever, if it were left alone
            assert gone(hung)
            assert (await store.samples("b"))[0].tokens != hung

    asyncio.run(go())
    assert "no answer in time" in caplog.text


def test_a_process_that_dies_over_a_question_is_replaced(uri: str) -> None:
    async def go() -> None:
        async with reading(uri) as store:
            before = (await store.samples("a"))[0].tokens
            with pytest.raises(UnreadableError, match="does not answer"):
                await store.samples("dies")
            assert (await store.samples("b"))[0].tokens != before

    asyncio.run(go())


def test_a_process_whose_idle_time_ends_as_it_is_asked_is_replaced_unnoticed(uri: str) -> None:
    async def go() -> None:
        async with reading(uri) as store:
            before = (await store.samples("a"))[0].tokens
            assert (await store.samples("dies if not the first"))[0].tokens != before

    asyncio.run(go())


async def until_gone(pid: int) -> None:
    """Wait until the process is gone and the event loop has heard of it."""
    async with asyncio.timeout(20):
        while psutil.pid_exists(pid):
            await asyncio.sleep(0.01)


def test_a_killed_process_is_replaced_unnoticed(uri: str) -> None:
    async def go() -> None:
        # Shorter than the start of a process: the new one has the time of a first question.
        async with reading(uri, timeout=0.1) as store:
            before = (await store.samples("a"))[0].tokens
            os.kill(before, signal.SIGKILL)
            await until_gone(before)
            assert (await store.samples("b"))[0].tokens != before

    asyncio.run(go())


def test_an_error_goes_to_the_log_and_not_to_the_user(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        async with reading(uri) as store:
            with pytest.raises(UnreadableError) as caught:
                await store.samples("fails")
            assert "lily" not in str(caught.value)
            assert (await store.samples("a"))[0].step == 2, "the process goes on"

    with caplog.at_level(logging.WARNING):
        asyncio.run(go())
    assert "lily.db is locked" in caplog.text


def test_too_many_questions_are_refused(uri: str) -> None:
    async def go() -> None:
        async with reading(uri) as store:
            asked = [asyncio.create_task(store.samples(str(number))) for number in range(40)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, UnreadableError)]
            assert len(refused) == 8
            assert "Many are looking" in str(refused[0])

    asyncio.run(go())


def test_an_idle_process_ends_and_a_later_question_starts_another(uri: str) -> None:
    async def go() -> None:
        async with reading(uri, idle_timeout=1.0, ttl=0.0) as store:
            before = (await store.samples("a"))[0].tokens
            await until_gone(before)
            assert (await store.samples("a"))[0].tokens != before

    asyncio.run(go())


def test_it_ends_with_the_app_however_the_app_ends(uri: str, repository: Path) -> None:
    async def go() -> int:
        async with reading(uri) as store:
            return (await store.samples("a"))[0].tokens

    assert gone(asyncio.run(go()))
    program = f"""
import asyncio, os, signal, sys
from experiments.dashboard import client
from tests.experiments.dashboard import stand_in

async def go():
    client.ask = stand_in.ask
    print((await client.StoreClient({uri!r}).samples("a"))[0].tokens, flush=True)
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
            async with reading(uri) as store:
                with pytest.raises(UnreadableError, match=r"`story train` fills it"):
                    await store.overview()
                assert store._worker is None, "nobody was asked"

    asyncio.run(go())
    assert list(tmp_path.iterdir()) == []


def test_missing_mlflow_is_one_line(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pretended, because the tests need MLflow themselves.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = why_absent(uri)
    assert line is not None
    assert line.startswith("MLflow, which keeps the experiments, is not installed here")
    assert "\n" not in line


def test_no_question_changes_the_store_and_its_client_could_not(tmp_path: Path) -> None:
    database = Path(
        shutil.copy(made().uri.removeprefix("sqlite:///"), tmp_path / "it's 100% mine?.db".replace("?", ""))
    )
    before = hashlib.sha256(database.read_bytes()).hexdigest()
    uri = f"sqlite:///{database}"
    (first, *_), _ = run_rows(open_store(uri, read_only=True))
    questions: tuple[Any, ...] = (("overview",), ("curves", [first.id], "training"), ("sample_sets", first.id))
    for question in questions:
        found, error = answer(uri, *question)
        assert (bool(found), error) == (True, None)
    with pytest.raises(MlflowException, match="readonly"):
        open_store(uri, read_only=True).set_tag(first.id, "seen", "yes")
    assert hashlib.sha256(database.read_bytes()).hexdigest() == before
    assert [path.name for path in tmp_path.iterdir()] == [database.name]


def test_a_missing_database_is_not_created_to_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        open_store(f"sqlite:///{tmp_path}/mlflow.db", read_only=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("question", [("delete",), ("sample_sets",), ("curves", ["x"], "m")])
def test_what_cannot_be_answered_is_an_error_in_one_line(question: Any) -> None:
    found, error = answer(made().uri, *question)
    assert found is None
    assert error
    assert "\n" not in error
