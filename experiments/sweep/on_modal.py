"""A sweep whose trials train on Modal: as many containers at once as there are workers, one study, one MLflow store.

The study, the prune checks and the log stay in the sweep's process, so nothing secret travels and no database has to be
open to the world. There a worker is a thread: it claims a trial, calls the deployed Function with its recipe, and hands
the container's reports to the same observers that a local trial has. In the container, `train_remotely` sends these
reports over a queue, and after each evaluation waits for a reply: why the trial should end, or None. Where none comes,
the sweep is gone: the run saves and stops, so that it costs no more money.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.modal_client import modal_errors
from experiments.sweep.plan import Plan
from experiments.sweep.study import open_study
from experiments.sweep.trial import Runner, Say, SweepWorker, TrialEnd, TrialJob, TrialObserver, run_trial
from experiments.sweep.worker import FAILED, STOPPED, LineObserver, WorkerConfig
from model.errors import DataError, DeployError, MissingExtraError, StoryError, one_line
from training.tracking.provenance import Provenance, provenance
from training.trainer.observers import EndRun, EvaluationReport, Observer, Outcome, RunEnd, RunStart, StepReport
from training.trainer.recipe import Recipe

if TYPE_CHECKING:
    import modal

APP, FUNCTION = "write-me-a-story", "sweep_trial"
CALL = "modal.call"
"""Note of a trial: the call that trains it, so that a later attempt can cancel one that still runs."""
POLL = 1.0
"""Seconds between two checks whether a silent call is still running."""
REPLY_TIMEOUT = 120.0
"""Seconds that a container waits for the reply to an evaluation."""
STEPS_AT_ONCE = 500
"""Steps in one message; a message may hold 1 MB."""


class RemoteTrialError(StoryError):
    """A trial failed in its container."""

    exit_code = FAILED


@dataclasses.dataclass(frozen=True, slots=True)
class RemoteStart:
    """The first message: how the run starts, and the code and machine that it runs on."""

    start: RunStart
    origin: Provenance


# In the container.


class WireObserver:
    """Sends a run's reports; the reply to an evaluation may end it. `commit` saves what was written to the Volume."""

    def __init__(self, wire: modal.Queue, key: str, commit: Callable[[], None]) -> None:
        self._wire, self._up, self._down, self._commit = wire, f"{key}.up", f"{key}.down", commit
        self._steps: list[StepReport] = []
        self._unsaved = False

    def started(self, start: RunStart) -> None:
        self._send(RemoteStart(start, provenance()))

    def stepped(self, report: StepReport) -> None:
        self._steps.append(report)
        if len(self._steps) >= STEPS_AT_ONCE:
            self._send_steps()
        if self._unsaved:  # the checkpoint that follows each evaluation is written by now
            self._unsaved = False
            self._commit()

    def evaluated(self, report: EvaluationReport) -> None:
        self._send_steps()
        self._send(report)
        self._unsaved = True
        try:
            reason = self._wire.get(timeout=REPLY_TIMEOUT, partition=self._down)
        except queue.Empty:
            reason = "the sweep no longer answers"
        if reason is not None:
            raise EndRun(reason)

    def ended(self, end: RunEnd) -> None:
        self._send_steps()
        self._send(end)
        self._commit()

    def _send_steps(self) -> None:
        if self._steps:
            self._send(self._steps)
            self._steps = []

    def _send(self, message: Any) -> None:
        self._wire.put(message, partition=self._up)


def train_remotely(job: dict[str, Any], wire: modal.Queue, root: Path, commit: Callable[[], None]) -> None:
    """Train the trial of `job` in the Volume at `root`; its `TrialEnd`, or an error's text, is the last message.

    `job`: `key` of the partitions, `recipe`, name of the `data`, and the folders of the sweep and the trial.
    """
    data = root / "data" / job["data"]
    observer = WireObserver(wire, job["key"], commit)
    try:
        if not (data / "meta.json").is_file():
            raise DataError(
                f"the Volume holds no shards {job['data']}; `modal run -m deploy.modal_app::prepare` makes tinystories"
            )
        end: object = run_trial(
            Recipe.from_dict(job["recipe"]),
            data=data,
            out=root / "sweeps" / job["sweep"] / job["folder"],
            observers=[observer],
        )
    except StoryError as error:
        end = str(error)  # as text, because some errors cannot be pickled
    wire.put(end, partition=f"{job['key']}.up")


# In the sweep's process.


def run_on_modal(config: WorkerConfig, plan: Plan, at_once: int, say: Say, stopping: Callable[[], bool]) -> int:
    """Run trials on Modal until enough are counted; return an exit code.

    Raises:
        StoryError: there is no account, or the Function is not deployed. MissingExtraError: no `modal` package.
    """
    try:
        import modal
    except ModuleNotFoundError as error:
        raise MissingExtraError("story sweep --on modal", "modal") from error

    with contextlib.ExitStack() as stack:
        with modal_errors():
            try:
                function = modal.Function.from_name(APP, FUNCTION).hydrate()
            except modal.exception.NotFoundError:
                raise DeployError(
                    f"{APP} is not deployed with {FUNCTION}: modal deploy -m deploy.modal_app::workshop"
                ) from None
            wire = stack.enter_context(modal.Queue.ephemeral())
        return run_calls(config, plan, at_once, say, stopping, function, wire)


def run_calls(
    config: WorkerConfig,
    plan: Plan,
    at_once: int,
    say: Say,
    stopping: Callable[[], bool],
    function: Any,
    wire: modal.Queue,
) -> int:
    """Run trials by calls of `function`, `at_once` at a time."""
    runner = remote_runner(config, plan, say, stopping, function, wire)
    workers = [
        SweepWorker(
            open_study(config.storage, config.name),
            Path(config.out),
            runner,
            trials=config.trials,
            say=say,
            stopping=stopping,
        )
        for _ in range(at_once)
    ]
    with ThreadPoolExecutor(at_once, "sweep worker") as pool:
        for done in [pool.submit(worker.run) for worker in workers]:
            done.result()
    if stopping() or any(worker.interrupted for worker in workers):
        return STOPPED
    return FAILED if any(worker.failures for worker in workers) else 0


def remote_runner(
    config: WorkerConfig, plan: Plan, say: Say, stopping: Callable[[], bool], function: Any, wire: modal.Queue
) -> Runner:
    """Return a runner that trains a job by a call and follows it."""

    def run(job: TrialJob) -> TrialEnd:
        if (before := job.trial.user_attrs.get(CALL)) is not None:
            cancel_call(before)  # of a process that is gone; two calls must not write to one folder
        key = uuid.uuid4().hex
        request = {"key": key, "recipe": job.recipe.as_dict(), "data": plan.data}
        call = function.spawn(request | {"sweep": config.name, "folder": job.folder.name}, wire)
        job.trial.set_user_attr(CALL, call.object_id)
        remote = _RemoteRun(config, job, say)
        try:
            return _follow(call, remote, wire, key, stopping)
        except BaseException as error:
            with contextlib.suppress(Exception):
                call.cancel()
            remote.end("failed", one_line(error))
            raise

    return run


def cancel_call(call_id: str) -> None:
    """End a call of an earlier process, if it still runs."""
    import modal

    with contextlib.suppress(modal.exception.Error):
        modal.FunctionCall.from_id(call_id).cancel()


def _follow(call: Any, remote: _RemoteRun, wire: modal.Queue, key: str, stopping: Callable[[], bool]) -> TrialEnd:
    """Handle the container's messages until the trial has ended."""
    over = False
    while True:
        if stopping():
            call.cancel()
            return remote.end("stopped", "interrupted by hand")
        try:
            message: Any = wire.get(timeout=POLL, partition=f"{key}.up")
        except queue.Empty:
            if over:
                raise RemoteTrialError("its container ended without a result") from None
            with contextlib.suppress(TimeoutError):  # it still runs
                call.get(timeout=0)
                over = True  # its last message may still be on its way: look once more
            continue
        match message:
            case TrialEnd():
                if message.how == "stopped" and remote.own.pruned:
                    return dataclasses.replace(message, how="pruned")
                return message
            case str():
                raise RemoteTrialError(message)
            case EvaluationReport():
                wire.put(remote.evaluated(message), partition=f"{key}.down")
            case _:
                remote.handle(message)


class _RemoteRun:
    """Passes one remote run's reports on to observers here."""

    def __init__(self, config: WorkerConfig, job: TrialJob, say: Say) -> None:
        self._config, self._job = config, job
        self.own = TrialObserver(job.recipe, job.prune_check, job.on_start)
        self._observers: list[Observer] = [LineObserver(job.number, say)]

    def handle(self, message: RemoteStart | list[StepReport] | RunEnd) -> None:
        match message:
            case RemoteStart():
                self.own.started(message.start)
                if self._config.parent_run is not None:
                    self._observers.append(self._config.mlflow_observer(self._job.number, message.origin))
                # What is written beside the run's files is written on this machine.
                start = dataclasses.replace(message.start, out=self._job.folder)
                for observer in self._observers:
                    observer.started(start)
            case list():
                for report in message:
                    for observer in (self.own, *self._observers):
                        observer.stepped(report)
            case RunEnd():
                self._end(dataclasses.replace(message, checkpoint=None))

    def evaluated(self, report: EvaluationReport) -> str | None:
        """Handle an evaluation; return why the trial should end, or None."""
        for observer in self._observers:
            observer.evaluated(report)
        try:
            self.own.evaluated(report)
        except EndRun as end:
            return str(end)
        return None

    def end(self, outcome: Outcome, reason: str) -> TrialEnd:
        """End the observers, for a run that reports no more itself."""
        own = self.own
        self._end(
            RunEnd(
                outcome=outcome,
                reason=reason,
                step=own.step,
                tokens=own.tokens,
                best_bits_per_byte=own.best,
                checkpoint=None,
            )
        )
        return TrialEnd("stopped", reason, own.best, own.step, own.tokens)

    def _end(self, end: RunEnd) -> None:
        observers, self._observers = self._observers, []
        for observer in observers:
            observer.ended(end)
