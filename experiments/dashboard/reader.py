"""Asks the process that reads MLflow, and answers from memory for some seconds after each question.

However many visitors reload the page, one question at a time goes to that process, the same question never twice at
once, and none waits longer than `patience`. The process is started by the first question, dismissed after a while
without one, and ends with its input when this one ends, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from experiments.dashboard.absent import why_absent
from experiments.dashboard.records import Curve, Moment, Overview
from model.errors import StoryError

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "experiments.dashboard")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # A server that is gone should be known before a visitor is.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}
LONGEST_ANSWER = 32 * 1024 * 1024
"""Bytes of one line."""
MOST_KEPT, MOST_WAITING = 64, 32

log = logging.getLogger(__name__)


class UnreadableError(StoryError):
    """Nothing can be shown of the store; the message is for a visitor and names neither address nor folder."""

    exit_code = 3


class StoreReader:
    """Reads the store at `uri` through a process of its own, from within one event loop.

    Args:
        uri: the MLflow store.
        fresh: seconds for which an answer is good.
        patience: seconds that one question may take.
        first_patience: the same for the first one, in which MLflow is loaded.
        idle: seconds without a question after which the process is dismissed.
        command: what answers; see `experiments.dashboard.__main__`.
    """

    def __init__(
        self,
        uri: str,
        *,
        fresh: float = 10.0,
        patience: float = 15.0,
        first_patience: float = 60.0,
        idle: float = 600.0,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._uri, self._command = uri, command
        self._fresh, self._patience, self._first_patience = fresh, patience, first_patience
        self._idle = idle
        self._kept: dict[str, tuple[float, Any]] = {}
        self._asked: dict[str, asyncio.Task[Any]] = {}
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._warm = False
        self._dismissal: asyncio.TimerHandle | None = None
        self._leaving: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """End the process, if one was started, when this context ends."""
        try:
            yield
        finally:
            await self.close()

    @property
    def pid(self) -> int | None:
        """Of the process that reads, while there is one."""
        return None if self._process is None else self._process.pid

    async def overview(self, *, known: bool = False) -> Overview:
        """Runs, benchmarks, versions; `known`: an older answer will do. Raises `UnreadableError`."""
        return Overview.of(await self._answer({"ask": "overview"}, known=known))

    async def curves(self, runs: Sequence[str], measure: str) -> list[Curve]:
        """A curve for each run (whole ids of runs of the overview). Raises `UnreadableError`."""
        if not runs:
            return []
        plain = await self._answer({"ask": "curves", "runs": list(runs), "measure": measure})
        return [Curve.of(curve) for curve in plain]

    async def moments(self, run: str) -> list[Moment]:
        """What a run wrote, by step. Raises `UnreadableError`."""
        return [Moment.of(moment) for moment in await self._answer({"ask": "moments", "run": run})]

    async def close(self) -> None:
        """Let go of everything; the next question would start again."""
        tasks: list[asyncio.Task[Any]] = [*self._asked.values(), *filter(None, [self._leaving])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with self._turn:
            await self._dismiss()

    async def _answer(self, question: dict[str, Any], *, known: bool = False) -> Any:
        if (reason := why_absent(self._uri)) is not None:
            raise UnreadableError(reason)
        key = json.dumps(question)
        at, answer = self._kept.get(key, (-1e9, None))
        if time.monotonic() - at < self._fresh or (known and key in self._kept):
            return answer
        task = self._asked.get(key)
        if task is None:
            if len(self._asked) >= MOST_WAITING:
                raise UnreadableError("Many are looking at the experiments; please try again in a moment.")
            task = self._asked[key] = asyncio.create_task(self._ask(key))
            task.add_done_callback(lambda _: self._asked.pop(key, None))
        return await asyncio.shield(task)  # a visitor who goes away does not take it from the others

    async def _ask(self, key: str) -> Any:
        async with self._turn:
            if self._dismissal is not None:
                self._dismissal.cancel()
            try:
                async with asyncio.timeout(self._patience if self._warm else self._first_patience):
                    reply = await self._exchange(key)
            except BaseException as error:
                await self._dismiss()  # a late answer would be taken for the next question's
                if not isinstance(error, TimeoutError | OSError | ValueError):
                    raise
                log.warning("the experiments cannot be read: %s", str(error) or "no answer in time")
                raise UnreadableError(
                    "The store of the experiments does not answer; please try again in a moment."
                ) from None
            self._warm = True
            self._dismissal = asyncio.get_running_loop().call_later(self._idle, self._hang_up)
        if "error" in reply:
            log.warning("the experiments cannot be read: %s", reply["error"])
            raise UnreadableError("The store of the experiments cannot be read; the server's log says why.")
        while len(self._kept) >= MOST_KEPT:
            self._kept.pop(next(iter(self._kept)))
        self._kept.pop(key, None)
        self._kept[key] = (time.monotonic(), reply["answer"])
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
        paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        return await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={
                **ENVIRONMENT,
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "MLFLOW_TRACKING_URI": self._uri,
            },
            limit=LONGEST_ANSWER,
            start_new_session=True,  # Ctrl-C in the terminal is for the app, which ends this one in order
        )

    def _hang_up(self) -> None:
        self._leaving = asyncio.create_task(self._let_go())

    async def _let_go(self) -> None:
        """End the process between two questions."""
        async with self._turn:
            await self._dismiss()
            self._kept.clear()

    async def _dismiss(self) -> None:
        """End the process and wait until it is gone."""
        process, self._process = self._process, None
        if self._dismissal is not None:
            self._dismissal.cancel()
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()  # it only reads, so there is nothing to be lost
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()
