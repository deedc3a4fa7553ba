"""Ask a process that reads MLflow, and cache its answers for some seconds.

However many users reload the page, one question at a time goes to that process, identical concurrent questions are
coalesced, and none waits longer than `timeout`. The process is a worker of anyio's that runs `ask`: started by the
first question, killed with one that takes too long, ended with its input when this process ends in any way, and by
itself after a while without a question.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anyio import BrokenWorkerProcess, to_process

from experiments.common.background import background
from experiments.dashboard import moves
from experiments.dashboard.ages import cached
from experiments.dashboard.recorded import with_record
from experiments.dashboard.records import AgeRow, Curve, Measure, Overview, SampleSet, TrainingRecord
from model.errors import StoryError, one_line
from training.tracking.store import database_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

Question = Literal["overview", "curves", "sample_sets", "age_rows", "age_folder"]
"""A function of `rows`."""
# Notice a server that is down before the user gives up.
ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


def ask(uri: str, idle_timeout: float, question: Question, *arguments: Any) -> tuple[Any, str | None, int]:
    """Answer as `answer`, and return the id of this process too, which ends when nobody asks for `idle_timeout` s."""
    with background(idle_timeout):
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        return *answer(uri, question, *arguments), os.getpid()


def answer(uri: str, question: Question, *arguments: Any) -> tuple[Any, str | None]:
    """Return records, or None and in one line for the log why there are none."""
    try:
        from experiments.dashboard import rows

        return getattr(rows, question)(_opened(uri), *arguments), None
    except StoryError as error:
        return None, str(error)
    except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
        return None, f"{type(error).__name__}: {one_line(error)}"


@functools.cache
def _opened(uri: str) -> MlflowClient:
    from training.tracking.store import open_store

    return open_store(uri, read_only=True)


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
        record: of the shipped model; shown beside what the store holds, and alone where the store cannot be read.
        ttl: seconds for which an answer is cached.
        timeout: seconds that one question may take.
        first_timeout: the same for a question that has to start a process, which loads MLflow.
        idle_timeout: seconds without a question after which the process ends.
    """

    def __init__(
        self,
        uri: str,
        *,
        record: TrainingRecord | None = None,
        ttl: float = 10.0,
        timeout: float = 15.0,
        first_timeout: float = 60.0,
        idle_timeout: float = 600.0,
    ) -> None:
        self.uri = uri
        self._record, self._ttl = record, ttl
        self._timeout, self._first_timeout, self._idle_timeout = timeout, first_timeout, idle_timeout
        self._cached: dict[tuple[Any, ...], tuple[float, Any]] = {}
        self._pending: dict[tuple[Any, ...], asyncio.Task[Any]] = {}
        self._turn = asyncio.Lock()
        self._worker: int | None = None
        """Id of the process that answered last, and so has loaded MLflow."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Cancel all questions at the end of the context; the process ends with the event loop."""
        try:
            yield
        finally:
            tasks = list(self._pending.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def overview(self, *, stale_ok: bool = False) -> Overview:
        """Return runs, evaluations, benchmarks and versions; `stale_ok`: an expired answer will do.

        Raises `UnreadableError` where there is no record either.
        """
        try:
            found: Overview = await self._answer("overview", stale_ok=stale_ok)
        except UnreadableError as error:
            if self._record is None:
                raise
            found = Overview(reason=str(error))
        return found if self._record is None else with_record(found, self._record)

    async def curves(self, runs: Sequence[str], measure: Measure) -> list[Curve]:
        """Return a curve for each run (whole ids of runs of the overview). Raises `UnreadableError`."""
        recorded = await self._recorded(runs)
        known = () if self._record is None else self._record.curves.get(measure, ())
        found = {curve.run: curve for curve in known if curve.run in recorded}
        if stored := tuple(run for run in runs if run not in recorded):
            found |= {curve.run: curve for curve in await self._answer("curves", stored, measure)}
        return [found[run] for run in runs if run in found]

    async def samples(self, run: str) -> list[SampleSet]:
        """Return a run's sample stories, by step. Raises `UnreadableError`."""
        if self._record is not None and await self._recorded([run]):
            return list(self._record.samples.get(run, ()))
        found: list[SampleSet] = await self._answer("sample_sets", run)
        return found

    async def ages(self, run: str) -> list[AgeRow]:
        """Return the ages of a run, the youngest first. Raises `UnreadableError`."""
        if self._record is not None and await self._recorded([run]):
            return []
        found: list[AgeRow] = await self._answer("age_rows", run)
        return found

    async def age_folder(self, run: str, step: int) -> Path:
        """Return the folder of an age of a run: out of the cache, where it is. Raises `UnreadableError`."""
        if (folder := cached(run, step)) is None:
            folder = Path(await self._answer("age_folder", run, step))
            self._cached.pop(("age_folder", run, step), None)  # the folder itself is the cache, and may be tidied up
        return folder

    async def move(self, thresholds: Path, action: moves.Action, version: str, plan: str) -> moves.Answer:
        """Move the alias `champion`, or show what would move: see `moves.move`. What is read afterwards is read anew.

        A move that has begun is not cancelled: half of it would be worse. Raises `UnreadableError`.
        """
        if (reason := why_absent(self.uri)) is not None:
            raise UnreadableError(reason)
        async with self._turn:
            try:
                given = (self.uri, thresholds, self._idle_timeout, action, version, plan)
                found = await to_process.run_sync(moves.move, *given)
            except BrokenWorkerProcess as error:
                log.warning("the champion cannot be moved: %s", error)
                raise UnreadableError(
                    "The store of the experiments does not answer; look at the versions before you try again."
                ) from None
            self._cached.clear()
        if found.error:
            log.warning("the champion cannot be moved: %s", found.error)
        return found

    async def _recorded(self, runs: Sequence[str]) -> set[str]:
        """Which of `runs` come from the record, and not from the store."""
        if self._record is None or not {row.id for row in self._record.overview.runs}.intersection(runs):
            return set()
        seen = await self.overview(stale_ok=True)
        return {row.id for row in seen.runs if row.recorded}.intersection(runs)

    async def _answer(self, question: Question, *arguments: Any, stale_ok: bool = False) -> Any:
        if (reason := why_absent(self.uri)) is not None:
            raise UnreadableError(reason)
        key = (question, *arguments)
        at, answer = self._cached.get(key, (-1e9, None))
        if time.monotonic() - at < self._ttl or (stale_ok and key in self._cached):
            return answer
        task = self._pending.get(key)
        if task is None:
            if len(self._pending) >= MAX_WAITING:
                raise UnreadableError("Many are looking at the experiments; please try again in a moment.")
            task = self._pending[key] = asyncio.create_task(self._ask(question, *arguments))
            task.add_done_callback(lambda _: self._pending.pop(key, None))
        return await asyncio.shield(task)  # others may wait for it when this user disconnects

    async def _ask(self, question: Question, *arguments: Any) -> Any:
        async with self._turn:
            try:
                answer, error = await self._from_process(question, *arguments)
            except (TimeoutError, BrokenWorkerProcess) as failure:
                log.warning("the experiments cannot be read: %s", str(failure) or "no answer in time")
                raise UnreadableError(
                    "The store of the experiments does not answer; please try again in a moment."
                ) from None
        if error is not None:
            log.warning("the experiments cannot be read: %s", error)
            raise UnreadableError("The store of the experiments cannot be read; the server's log says why.")
        key = (question, *arguments)
        self._cached.pop(key, None)
        while len(self._cached) >= MAX_CACHED:
            self._cached.pop(next(iter(self._cached)))
        self._cached[key] = (time.monotonic(), answer)
        return answer

    async def _from_process(self, question: Question, *arguments: Any) -> tuple[Any, str | None]:
        before, self._worker = self._worker, None
        warm = before is not None and _is_there(before)
        given = (self.uri, self._idle_timeout, question, *arguments)
        try:
            async with asyncio.timeout(self._timeout if warm else self._first_timeout):
                answer, error, self._worker = await to_process.run_sync(ask, *given, cancellable=True)
            return answer, error
        except BrokenWorkerProcess:
            if before is None:
                raise
            return await self._from_process(question, *arguments)  # its idle time ended as it was asked


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
