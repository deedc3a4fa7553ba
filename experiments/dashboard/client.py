"""Ask the process that reads MLflow, and cache its answers for some seconds.

However many users reload the page, one question at a time goes to that process, identical concurrent questions are
coalesced, and none waits longer than `timeout`. The process is started by the first question, ended after a while
without one, and ends with its input when this process ends in any way.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from experiments.dashboard.records import Curve, Overview, SampleSet
from model.errors import StoryError
from training.tracking.store import database_file

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", __package__)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Notice a server that is down before the user gives up.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}
LONGEST_ANSWER = 32 * 1024 * 1024
"""Bytes of one line."""
MAX_CACHED, MAX_WAITING = 64, 32
NOTHING = "There is no experiment yet: this page shows what MLflow keeps, and `story train` fills it."

log = logging.getLogger(__name__)


class UnreadableError(StoryError):
    """Nothing can be shown of the store; the message is for the user and names neither address nor folder."""

    exit_code = 3


def why_absent(uri: str) -> str | None:
    """Return in one line why the store at `uri` cannot be asked, found out without MLflow; None: it can."""
    if importlib.util.find_spec("mlflow") is None:
        return (
            "MLflow, which keeps the experiments, is not installed here; "
            "install the extra `train`, and `story train` fills this page."
        )
    if (database := database_file(uri)) is not None and not (database.is_file() and database.stat().st_size):
        return NOTHING
    return None


class StoreClient:
    """Reads the store at `uri` through a process of its own, from within one event loop.

    Args:
        uri: the MLflow store.
        ttl: seconds for which an answer is cached.
        timeout: seconds that one question may take.
        first_timeout: the same for the first question, which loads MLflow.
        idle_timeout: seconds without a question after which the process is ended.
        command: the process to start; see `experiments.dashboard.__main__`.
    """

    def __init__(
        self,
        uri: str,
        *,
        ttl: float = 10.0,
        timeout: float = 15.0,
        first_timeout: float = 60.0,
        idle_timeout: float = 600.0,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._uri, self._command = uri, command
        self._ttl, self._timeout, self._first_timeout = ttl, timeout, first_timeout
        self._idle_timeout = idle_timeout
        self._cached: dict[str, tuple[float, Any]] = {}
        self._pending: dict[str, asyncio.Task[Any]] = {}
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._warm = False
        self._idle_timer: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.close()

    @property
    def pid(self) -> int | None:
        """Of the process that reads, while there is one."""
        return None if self._process is None else self._process.pid

    async def overview(self, *, stale_ok: bool = False) -> Overview:
        """Return runs, benchmarks, versions; `stale_ok`: an expired answer will do. Raises `UnreadableError`."""
        return Overview.model_validate(await self._answer({"ask": "overview"}, stale_ok=stale_ok))

    async def curves(self, runs: Sequence[str], measure: str) -> list[Curve]:
        """Return a curve for each run (whole ids of runs of the overview). Raises `UnreadableError`."""
        if not runs:
            return []
        plain = await self._answer({"ask": "curves", "runs": list(runs), "measure": measure})
        return [Curve.model_validate(curve) for curve in plain]

    async def samples(self, run: str) -> list[SampleSet]:
        """Return a run's sample stories, by step. Raises `UnreadableError`."""
        return [SampleSet.model_validate(each) for each in await self._answer({"ask": "samples", "run": run})]

    async def close(self) -> None:
        """Cancel all questions and end the process; a later question would start it again."""
        tasks: list[asyncio.Task[Any]] = [*self._pending.values(), *filter(None, [self._ending])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with self._turn:
            await self._end_process()

    async def _answer(self, question: dict[str, Any], *, stale_ok: bool = False) -> Any:
        if (reason := why_absent(self._uri)) is not None:
            raise UnreadableError(reason)
        key = json.dumps(question)
        at, answer = self._cached.get(key, (-1e9, None))
        if time.monotonic() - at < self._ttl or (stale_ok and key in self._cached):
            return answer
        task = self._pending.get(key)
        if task is None:
            if len(self._pending) >= MAX_WAITING:
                raise UnreadableError("Many are looking at the experiments; please try again in a moment.")
            task = self._pending[key] = asyncio.create_task(self._ask(key))
            task.add_done_callback(lambda _: self._pending.pop(key, None))
        return await asyncio.shield(task)  # others may wait for it when this user disconnects

    async def _ask(self, key: str) -> Any:
        async with self._turn:
            if self._idle_timer is not None:
                self._idle_timer.cancel()
            try:
                async with asyncio.timeout(self._timeout if self._warm else self._first_timeout):
                    reply = await self._exchange(key)
            except BaseException as error:
                await self._end_process()  # a late answer would be taken for the next question's
                if not isinstance(error, TimeoutError | OSError | ValueError):
                    raise
                log.warning("the experiments cannot be read: %s", str(error) or "no answer in time")
                raise UnreadableError(
                    "The store of the experiments does not answer; please try again in a moment."
                ) from None
            self._warm = True
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_later(self._idle_timeout, self._on_idle)
        if "error" in reply:
            log.warning("the experiments cannot be read: %s", reply["error"])
            raise UnreadableError("The store of the experiments cannot be read; the server's log says why.")
        self._cached.pop(key, None)
        while len(self._cached) >= MAX_CACHED:
            self._cached.pop(next(iter(self._cached)))
        self._cached[key] = (time.monotonic(), reply["answer"])
        return reply["answer"]

    async def _exchange(self, line: str) -> dict[str, Any]:
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line.encode() + b"\n")
        await process.stdin.drain()
        reply = json.loads(await process.stdout.readline() or "null")
        if not isinstance(reply, dict):
            raise ValueError("the process that reads has ended")
        return reply

    async def _start(self) -> asyncio.subprocess.Process:
        self._warm = False
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**ENVIRONMENT, **os.environ, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": self._uri},
            limit=LONGEST_ANSWER,
            start_new_session=True,  # Ctrl-C in the terminal is for the app, which ends this process itself
        )

    def _on_idle(self) -> None:
        self._ending = asyncio.create_task(self._end_between_questions())

    async def _end_between_questions(self) -> None:
        async with self._turn:
            await self._end_process()
            self._cached.clear()

    async def _end_process(self) -> None:
        """End the process and wait until it is gone."""
        process, self._process = self._process, None
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()  # it only reads, so nothing can be lost
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()
