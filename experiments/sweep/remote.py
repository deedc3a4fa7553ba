"""Trials that train elsewhere: in processes of this machine, or on Modal in as many containers as trials at once.

The study, the pruning and the log stay in the sweep's process, so nothing secret travels and no database has to be open
to the world. There a thread starts a trial's training (a process, or a call of the deployed Function) and hands its
reports to the same observers that a training in this process has. The other end sends these reports over a pipe or
Modal's Queue, and after each evaluation waits for a reply: why the trial should end, or None. Where none comes, the
sweep is gone: the run saves and stops, so that it costs no more time or money.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.modal_client import modal_errors
from experiments.sweep.study import OWNER
from experiments.sweep.trial import KilledError, Runner, TrialObserver, run_trial
from model.errors import DeployError, MissingExtraError, StoryError, one_line
from training.tracking.provenance import Provenance, provenance
from training.tracking.store import owner_of
from training.trainer.observers import EndRun, EvaluationReport, Observer, RunEnd, RunStart, StepReport
from training.trainer.recipe import Recipe

if TYPE_CHECKING:
    import modal

APP, FUNCTION = "write-me-a-story", "sweep_trial"
CALL = "modal.call"
"""User attribute of a trial: the call that trains it, so that a later attempt can cancel one that still runs."""
POLL = 1.0
"""Seconds between two checks whether the sweep stops, or a silent training has ended."""
REPLY_TIMEOUT = 120.0
"""Seconds that a container waits for the reply to an evaluation."""
STEPS_AT_ONCE = 500
"""Steps in one message; a message to Modal may hold 1 MB."""

TrialLog = Callable[[int, Provenance | None], list[Observer]]
"""(number of a trial, the code and machine that train it where not this process's) → what logs it to MLflow."""


class RemoteTrialError(StoryError):
    """A trial failed where it was trained."""

    exit_code = 1


class _StoppedError(Exception):
    """The sweep stops, and the training with it."""


# At the other end.


@dataclasses.dataclass
class SendingObserver:
    """Sends a run's reports; the reply to an evaluation may end it."""

    send: Callable[[Any], None]
    reply: Callable[[], str | None]
    commit: Callable[[], None] = lambda: None
    """Saves what was written to a Volume."""

    def __post_init__(self) -> None:
        self._steps: list[StepReport] = []
        self._unsaved = False
        self._parent = os.getppid()

    def started(self, start: RunStart) -> None:
        self.send((start, provenance()))

    def stepped(self, report: StepReport) -> None:
        self._steps.append(report)
        if len(self._steps) >= STEPS_AT_ONCE:
            self._send_steps()
        if self._unsaved:  # the checkpoint that follows each evaluation is written by now
            self._unsaved = False
            self.commit()
        if os.getppid() != self._parent:
            raise EndRun("the sweep was killed")

    def evaluated(self, report: EvaluationReport) -> None:
        self._send_steps()
        self.send(report)
        self._unsaved = True
        try:
            reason = self.reply()
        except (queue.Empty, EOFError, OSError):
            reason = "the sweep no longer answers"
        if reason is not None:
            raise EndRun(reason)

    def ended(self, end: RunEnd) -> None:
        self._send_steps()
        self.send(dataclasses.replace(end, checkpoint=None))
        self.commit()

    def _send_steps(self) -> None:
        self.send(self._steps)
        self._steps = []


def train_remotely(job: dict[str, Any], wire: modal.Queue, root: Path, commit: Callable[[], None]) -> None:
    """Train the trial of `job` in a container with the Volume at `root`; None or an error's text is the last message.

    `job`: `key` of the Queue's partitions, `recipe`, and below `root` the folders `data` of the shards and `out`.
    """
    up, down = f"{job['key']}.up", f"{job['key']}.down"

    def send(message: Any) -> None:
        wire.put(message, partition=up)

    def reply() -> Any:
        return wire.get(timeout=REPLY_TIMEOUT, partition=down)

    data = root / job["data"]
    if not (data / "meta.json").is_file():
        send(f"the Volume holds no shards {data.name}; `modal run -m deploy.modal_app::prepare` makes tinystories")
    else:
        _train(job, data, root / job["out"], SendingObserver(send, reply, commit))


def _train_in_process(job: dict[str, Any], pipe: Connection, threads: int) -> None:
    import torch

    def send(message: Any) -> None:
        with contextlib.suppress(OSError):  # the sweep was killed
            pipe.send(message)

    torch.set_num_threads(threads)
    _train(job, Path(job["data"]), Path(job["out"]), SendingObserver(send, pipe.recv))


def _train(job: dict[str, Any], data: Path, out: Path, observer: SendingObserver) -> None:
    try:
        run_trial(Recipe.from_dict(job["recipe"]), data=data, out=out, observers=[observer])
        observer.send(None)
    except StoryError as error:
        observer.send(str(error))  # as text, because some errors cannot be pickled


# In the sweep's process.


def process_runner(data: Path, threads: int, log: TrialLog) -> Runner:
    """Return a runner that trains each trial in a process of its own."""
    context = multiprocessing.get_context("spawn")

    def train(trial: TrialObserver) -> None:
        ours, theirs = context.Pipe()
        job = {"recipe": trial.recipe.as_dict(), "data": str(data), "out": str(trial.folder)}
        process = context.Process(target=_train_in_process, args=(job, theirs, threads), daemon=True)
        # The terminal's Ctrl-C is for the sweep, which sends SIGTERM; the process inherits the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

        def receive() -> Any:
            while True:
                if trial.stopping():
                    process.terminate()  # it saves, and sends its end
                try:
                    if ours.poll(POLL):
                        return ours.recv()
                except (EOFError, OSError):
                    process.join()
                    if trial.stopping():
                        raise _StoppedError from None
                    if (code := process.exitcode or 0) < 0:
                        raise KilledError(f"its process was killed by signal {-code}") from None
                    raise RemoteTrialError("its process ended without a result") from None

        try:
            trial.trial.set_user_attr(OWNER, owner_of(process.pid).to_text())
            _follow(trial, log, receive, ours.send)
        finally:
            process.kill()  # does nothing to one that has ended
            process.join()

    return train


@contextlib.contextmanager
def modal_runner(sweep: str, data: str, log: TrialLog) -> Iterator[Runner]:
    """Give a runner that trains each trial in a container on Modal.

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
        yield call_runner(function, wire, sweep, data, log)


def call_runner(function: Any, wire: modal.Queue, sweep: str, data: str, log: TrialLog) -> Runner:
    """Return a runner that trains each trial by a call of `function`."""

    def train(trial: TrialObserver) -> None:
        if (before := trial.trial.user_attrs.get(CALL)) is not None:
            cancel_call(before)  # of a process that is gone; two calls must not write to one folder
        key = str(trial.trial.number)
        folders = {"data": f"data/{data}", "out": f"sweeps/{sweep}/{trial.folder.name}"}
        call = function.spawn({"key": key, "recipe": trial.recipe.as_dict(), **folders}, wire)
        trial.trial.set_user_attr(CALL, call.object_id)

        def receive() -> Any:
            over = False
            while not trial.stopping():
                try:
                    return wire.get(timeout=POLL, partition=f"{key}.up")
                except queue.Empty:
                    if over:
                        raise RemoteTrialError("its container ended without a result") from None
                    with contextlib.suppress(TimeoutError):  # it still runs
                        call.get(timeout=0)
                        over = True  # its last message may still be on its way: look once more
            call.cancel()
            raise _StoppedError

        try:
            _follow(trial, log, receive, lambda reply: wire.put(reply, partition=f"{key}.down"))
        except BaseException:
            with contextlib.suppress(Exception):
                call.cancel()
            raise

    return train


def cancel_call(call_id: str) -> None:
    """End a call of an earlier process, if it still runs."""
    import modal

    with contextlib.suppress(modal.exception.Error):
        modal.FunctionCall.from_id(call_id).cancel()


def _follow(
    trial: TrialObserver, log: TrialLog, receive: Callable[[], Any], reply: Callable[[str | None], None]
) -> None:
    """Pass a remote run's reports on to observers here, until it has ended."""
    observers: list[Observer] = [trial]

    def end_all(end: RunEnd) -> None:
        while observers:
            observers.pop().ended(end)

    try:
        while (message := receive()) is not None:
            match message:
                case (RunStart() as start, origin):
                    observers += log(trial.trial.number, origin)
                    for observer in observers:
                        # What is written beside the run's files is written on this machine.
                        observer.started(dataclasses.replace(start, out=trial.folder))
                case list():
                    for report in message:
                        for observer in observers:
                            with contextlib.suppress(EndRun):  # the sweep stops: `receive` sees to it
                                observer.stepped(report)
                case EvaluationReport():
                    reason = None
                    for observer in observers:
                        try:
                            observer.evaluated(message)
                        except EndRun as end:
                            reason = str(end)
                    reply(reason)
                case RunEnd():
                    end_all(message)
                case _:
                    raise RemoteTrialError(message)
    except _StoppedError:
        end_all(trial.cut_off("stopped", "interrupted by hand"))
    except Exception as error:
        end_all(trial.cut_off("failed", one_line(error)))
        raise
