"""A sweep whose trials train on Modal: as many containers at once as there are workers, one study, one MLflow store.

The study, the verdicts and the log stay in this process. A worker is a thread that claims a trial, calls the deployed
Function with its recipe, and hands what comes up the wire to the observers that a local trial would have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from experiments.common.modal_client import modal_errors
from experiments.sweep.objective import Job, Runner, Tell, Work
from experiments.sweep.parent import EXPERIMENT
from experiments.sweep.plan import Plan
from experiments.sweep.remote import Begun, Wire
from experiments.sweep.study import open_study
from experiments.sweep.trial import Ended
from experiments.sweep.worker import FAILED, STOPPED, Order, Steps, child_tags
from model.errors import DeployError, MissingExtraError, StoryError, one_line
from training.tracking.observer import MlflowObserver
from training.trainer.observers import EvaluationReport, Observer, Outcome, RunEnd

if TYPE_CHECKING:
    import modal

APP, FUNCTION = "write-me-a-story", "sweep_trial"
CALL = "modal.call"
"""What a trial notes of itself: the call that trains it, so that a later try can end one that still runs."""
POLL = 1.0
"""Seconds between two looks at whether a silent call still lives."""


class Call(Protocol):
    """`modal.FunctionCall`, as far as it is used."""

    @property
    def object_id(self) -> str: ...

    def get(self, timeout: float | None = None) -> Any:
        """Raises `TimeoutError` while it runs."""

    def cancel(self) -> None: ...


class Calls(Protocol):
    """How calls are made and found again."""

    def spawn(self, job: dict[str, Any]) -> Call: ...

    def cancel(self, call_id: str) -> None: ...


class ModalCalls:
    """Calls of the deployed Function, with the wire that they report on."""

    def __init__(self, function: modal.Function[..., Any, Any], wire: modal.Queue) -> None:
        self._function, self._wire = function, wire

    def spawn(self, job: dict[str, Any]) -> Call:
        call: Call = self._function.spawn(job, self._wire)
        return call

    def cancel(self, call_id: str) -> None:
        """End a call of an earlier process, if it still runs."""
        import modal

        with contextlib.suppress(modal.exception.Error):
            modal.FunctionCall.from_id(call_id).cancel()


class RemoteError(StoryError):
    """A trial failed in its container."""

    exit_code = FAILED


def run_on_modal(order: Order, plan: Plan, at_once: int, tell: Tell, stopping: Callable[[], bool]) -> int:
    """Run trials on Modal until enough are counted; returns an exit code.

    Raises:
        StoryError: there is no account, or the Function is not deployed. MissingExtraError: no `modal` package.
    """
    try:
        import modal
    except ModuleNotFoundError as error:
        raise MissingExtraError("story sweep --on modal", "modal") from error

    with contextlib.ExitStack() as open_while_running:
        with modal_errors():
            try:
                function = modal.Function.from_name(APP, FUNCTION).hydrate()
            except modal.exception.NotFoundError:
                raise DeployError(
                    f"{APP} is not deployed with {FUNCTION}: modal deploy -m deploy.modal_app::workshop"
                ) from None
            wire = open_while_running.enter_context(modal.Queue.ephemeral())
        return run_calls(order, plan, at_once, tell, stopping, ModalCalls(function, wire), wire)


def run_calls(
    order: Order, plan: Plan, at_once: int, tell: Tell, stopping: Callable[[], bool], calls: Calls, wire: Wire
) -> int:
    """The same with calls and a wire of any kind."""
    shares = [
        Work(
            open_study(order.storage, order.name), Path(order.out), runner(order, plan, tell, stopping, calls, wire),
            trials=order.trials, tell=tell, stopping=stopping,
        )
        for _ in range(at_once)
    ]  # fmt: skip
    errors: list[BaseException] = []

    def run(share: Work) -> None:
        try:
            share.run()
        except BaseException as error:  # for the thread that waits
            errors.append(error)

    threads = [threading.Thread(target=run, args=(share,), name="sweep worker") for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if stopping() or any(share.interrupted for share in shares):
        return STOPPED
    return FAILED if any(share.failures for share in shares) else 0


def runner(
    order: Order, plan: Plan, tell: Tell, stopping: Callable[[], bool], calls: Calls, wire: Wire
) -> Runner:
    """Trains a job by a call, and watches it as if it were here."""

    def run(job: Job) -> Ended:
        if (before := job.noted.get(CALL)) is not None:
            calls.cancel(before)  # of a process that is gone; two calls must not write to one folder
        key = uuid.uuid4().hex
        call = calls.spawn(
            {
                "key": key, "recipe": job.recipe.as_dict(), "data": plan.data, "sweep": order.name,
                "folder": job.folder.name,
            }
        )  # fmt: skip
        job.note(CALL, call.object_id)
        watched = _Watched(order, job, tell)
        try:
            return _follow(call, watched, job, wire, key, stopping)
        except BaseException as error:
            with contextlib.suppress(Exception):
                call.cancel()
            watched.end("failed", one_line(error))
            raise

    return run


def _follow(
    call: Call, watched: _Watched, job: Job, wire: Wire, key: str, stopping: Callable[[], bool]
) -> Ended:
    """Take what comes up the wire until the trial has ended."""
    over = False
    while True:
        if stopping():
            call.cancel()
            return watched.end("stopped", "interrupted by hand")
        try:
            message = wire.get(timeout=POLL, partition=f"{key}.up")
        except queue.Empty:
            if over:
                raise RemoteError("its container ended without a word") from None
            over = _is_over(call)  # what it said last may still be on its way: one more look
            continue
        match message:
            case Ended():
                return message
            case str():
                raise RemoteError(message)
            case (int() as part, float() as bits):
                wire.put(job.judge(part, bits), partition=f"{key}.down")
            case _:
                watched.tell(message)


def _is_over(call: Call) -> bool:
    """Whether a call has returned. Raises what it raised."""
    try:
        call.get(timeout=0)
    except TimeoutError:
        return False
    return True


class _Watched:
    """The observers of one remote run."""

    def __init__(self, order: Order, job: Job, tell: Tell) -> None:
        self._order, self._job = order, job
        self._observers: list[Observer] = [Steps(job.number, tell)]
        self._step = self._tokens = 0
        self._best: float | None = None

    def tell(self, message: Any) -> None:
        """Pass a report on to whom it belongs."""
        match message:
            case Begun():
                self._job.begun(message.start)
                if self._order.parent_run is not None:
                    self._observers.append(
                        MlflowObserver(
                            self._order.tracking_uri, experiment=EXPERIMENT, system_seconds=None, keep_model=False,
                            tags=child_tags(self._order, self._job.number), origin=message.origin,
                        )
                    )  # fmt: skip
                # What is noted beside the run's files is noted here.
                start = dataclasses.replace(message.start, out=self._job.folder)
                for observer in self._observers:
                    observer.started(start)
            case list():
                for report in message:
                    self._step, self._tokens = report.step, report.tokens
                    for observer in self._observers:
                        observer.stepped(report)
            case EvaluationReport():
                self._best = min(self._best or message.bits_per_byte, message.bits_per_byte)
                for observer in self._observers:
                    observer.evaluated(message)
            case RunEnd():
                self._end(dataclasses.replace(message, checkpoint=None))

    def end(self, outcome: Outcome, reason: str) -> Ended:
        """End them, for a run that says nothing more itself."""
        self._end(
            RunEnd(
                outcome=outcome, reason=reason, step=self._step, tokens=self._tokens,
                best_bits_per_byte=self._best, checkpoint=None,
            )
        )  # fmt: skip
        return Ended("stopped", reason, self._best, self._step, self._tokens)

    def _end(self, end: RunEnd) -> None:
        observers, self._observers = self._observers, []
        for observer in observers:
            observer.ended(end)
