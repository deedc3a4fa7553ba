"""A worker of a sweep on this machine: trains one trial after the other, in this process or in one of its own.

`python -m experiments.sweep.worker` reads an `Order` as JSON from its standard input (an address with a password does
not belong on a command line), and ends with 0, with 1 where a trial failed, or with 130 where it was stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.sweep.objective import Job, Runner, Tell, Work
from experiments.sweep.study import open_study
from experiments.sweep.trial import Ended, run_trial
from training.trainer.observers import EndRun, EvaluationReport, Observer, RunEnd, RunStart, StepReport

FAILED, STOPPED = 1, 130
"""Exit codes."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is told."""

    storage: str
    name: str
    out: str
    data: str
    trials: int
    """Of the whole sweep, all workers and earlier calls included."""
    threads: int
    tracking_uri: str | None
    parent_run: str | None
    """The sweep's MLflow run; None: nothing is logged."""


class Watch:
    """The observer that ends a run when `stopping` says so: a stop may have come while no step was being made."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self._stopping = stopping

    def started(self, start: RunStart) -> None:
        """Nothing can be ended yet."""

    def stepped(self, report: StepReport) -> None:
        if self._stopping():
            raise EndRun("interrupted by hand")

    def evaluated(self, report: EvaluationReport) -> None:
        """A step comes next."""

    def ended(self, end: RunEnd) -> None:
        """It has ended."""


class Steps:
    """The observer that tells a trial's evaluations in lines, for workers that share a terminal."""

    def __init__(self, number: int, tell: Tell) -> None:
        self._number, self._tell = number, tell

    def started(self, start: RunStart) -> None:
        begin = f"going on after step {start.resumed_from}" if start.resumed_from else "starting"
        self._tell(f"trial {self._number}: {begin}, {start.parameters:,} parameters")

    def stepped(self, report: StepReport) -> None:
        """Too often for lines."""

    def evaluated(self, report: EvaluationReport) -> None:
        self._tell(f"trial {self._number}: step {report.step}, {report.bits_per_byte:.4f} bits/byte")

    def ended(self, end: RunEnd) -> None:
        """How the trial went is told by whoever judges it."""


def child_tags(order: Order, number: int) -> dict[str, str]:
    """Tags by which MLflow shows a trial's run below the sweep's."""
    return {"mlflow.parentRunId": order.parent_run or "", "sweep": order.name, "sweep.trial": str(number)}


def local_runner(order: Order, tell: Tell, stopping: Callable[[], bool], *, bar: bool) -> Runner:
    """Trains in this process. `bar`: with a progress bar of its own, for one worker alone."""
    from experiments.sweep.parent import EXPERIMENT
    from training.tracking.observer import MlflowObserver
    from training.trainer.observers import ProgressObserver

    def run(job: Job) -> Ended:
        observers: list[Observer] = [Watch(stopping), ProgressObserver() if bar else Steps(job.number, tell)]
        if order.parent_run is not None:
            observers.append(
                MlflowObserver(
                    order.tracking_uri, experiment=EXPERIMENT, system_seconds=None, keep_model=False,
                    tags=child_tags(order, job.number),
                )
            )  # fmt: skip
        return run_trial(
            job.recipe, data=Path(order.data), out=job.folder, judge=job.judge, begun=job.begun,
            observers=observers,
        )  # fmt: skip

    return run


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """While inside, Ctrl-C and SIGTERM only set the event; outside the main thread, nothing can be caught."""
    stop = threading.Event()
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        stop.set()

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def work(order: Order, tell: Tell, stopping: Callable[[], bool], *, bar: bool) -> int:
    """Run trials until enough are counted; returns an exit code."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(order.threads)
    try:
        runner = local_runner(order, tell, stopping, bar=bar)
        study = open_study(order.storage, order.name)
        mine = Work(study, Path(order.out), runner, trials=order.trials, tell=tell, stopping=stopping)
        mine.run()
    finally:
        torch.set_num_threads(before)
    return STOPPED if mine.interrupted or stopping() else FAILED if mine.failures else 0


def say(line: str) -> None:
    """A line on standard error, in one piece: standard output belongs to `--json`."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main() -> int:
    """Be a worker process."""
    parent = os.getppid()
    with stop_signals() as stop:
        order = Order(**json.load(sys.stdin))

        def stopping() -> bool:
            return stop.is_set() or os.getppid() != parent  # a worker does not outlive its sweep

        from model.errors import StoryError

        try:
            return work(order, say, stopping, bar=False)
        except StoryError as error:
            say(f"story: {error}")
            return error.exit_code


def as_json(order: Order) -> str:
    """An order as a worker reads it."""
    return json.dumps(dataclasses.asdict(order))


if __name__ == "__main__":
    sys.exit(main())
