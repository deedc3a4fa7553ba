"""Workers of a sweep on this machine: in this process, or several processes that meet only in the study.

`python -m experiments.sweep.worker` reads a `WorkerConfig` as JSON from standard input (an address with a password does
not belong on a command line), and exits with 0, with 1 where a trial failed, or with 130 where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.sweep.study import EXPERIMENT, open_study
from experiments.sweep.trial import Runner, Say, SweepWorker, TrialEnd, TrialJob, run_trial
from model.errors import StoryError
from training.interrupts import stop_on_signals
from training.tracking.observer import MlflowObserver
from training.tracking.provenance import Provenance
from training.trainer.observers import EvaluationReport, Observer, ProgressObserver, RunEnd, RunStart, StepReport

FAILED, STOPPED = 1, 130
"""Exit codes."""
ROOT = Path(__file__).resolve().parents[2]
RESTARTS = 3
"""Workers that are replaced, at most, after something has killed them."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker needs to know."""

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

    def mlflow_observer(self, number: int, origin: Provenance | None = None) -> MlflowObserver:
        """Return the observer that logs trial `number` as a child of the sweep's run."""
        tags = {"mlflow.parentRunId": self.parent_run or "", "sweep": self.name, "sweep.trial": str(number)}
        return MlflowObserver(
            self.tracking_uri, experiment=EXPERIMENT, system_seconds=None, keep_model=False, tags=tags, origin=origin
        )


class LineObserver:
    """Reports a trial's evaluations in lines, for workers that share a terminal."""

    def __init__(self, number: int, say: Say) -> None:
        self._number, self._say = number, say

    def started(self, start: RunStart) -> None:
        begin = f"resuming after step {start.resumed_from}" if start.resumed_from else "starting"
        self._say(f"trial {self._number}: {begin}, {start.parameters:,} parameters")

    def stepped(self, report: StepReport) -> None:
        """Steps are too frequent for lines."""

    def evaluated(self, report: EvaluationReport) -> None:
        self._say(f"trial {self._number}: step {report.step}, {report.bits_per_byte:.4f} bits/byte")

    def ended(self, end: RunEnd) -> None:
        """`SweepWorker` reports the end."""


def local_runner(config: WorkerConfig, say: Say, stopping: Callable[[], bool], *, bar: bool) -> Runner:
    """Return a runner that trains in this process. `bar`: with a progress bar, for a single worker."""

    def run(job: TrialJob) -> TrialEnd:
        observers: list[Observer] = [ProgressObserver() if bar else LineObserver(job.number, say)]
        if config.parent_run is not None:
            observers.append(config.mlflow_observer(job.number))
        return run_trial(
            job.recipe,
            data=Path(config.data),
            out=job.folder,
            prune_check=job.prune_check,
            on_start=job.on_start,
            stopping=stopping,
            observers=observers,
        )

    return run


def work(config: WorkerConfig, say: Say, stopping: Callable[[], bool], *, bar: bool) -> int:
    """Run trials in this process until enough are counted; return an exit code."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        runner = local_runner(config, say, stopping, bar=bar)
        study = open_study(config.storage, config.name)
        worker = SweepWorker(study, Path(config.out), runner, trials=config.trials, say=say, stopping=stopping)
        worker.run()
    finally:
        torch.set_num_threads(before)
    return STOPPED if worker.interrupted or stopping() else FAILED if worker.failures else 0


def run_workers(config: WorkerConfig, count: int, say: Say, stopping: Callable[[], bool]) -> int:
    """Run `count` worker processes to their ends; return 0 or the first exit code that is not.

    A worker that was killed is replaced, and its trial is retried. When `stopping` says so, all are asked to save and
    stop, and get as much time as they need for it.
    """
    workers = [_start(config) for _ in range(count)]
    codes: list[int] = []
    restarts, asked = RESTARTS, False
    try:
        while workers:
            if stopping() and not asked:
                asked = True
                for worker in workers:
                    worker.send_signal(signal.SIGTERM)
            for worker in [worker for worker in workers if worker.poll() is not None]:
                workers.remove(worker)
                if worker.returncode < 0 and not asked and restarts:
                    restarts -= 1
                    say(f"a worker was killed by signal {-worker.returncode}; another takes its place")
                    workers.append(_start(config))
                elif worker.returncode < 0:
                    codes.append(STOPPED if asked else 1)
                else:
                    codes.append(worker.returncode)
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return STOPPED if asked else next((code for code in codes if code), 0)


def _start(config: WorkerConfig) -> subprocess.Popen[bytes]:
    """Start a worker away from the terminal's Ctrl-C, which reaches only the sweep and is passed on by it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    worker = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": str(config.threads), "PYTHONPATH": path},
        start_new_session=True,
    )
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(dataclasses.asdict(config)).encode())
    worker.stdin.close()
    return worker


def say(line: str) -> None:
    """Write a line to standard error at once: standard output belongs to `--json`."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main() -> int:
    """Run as a worker process."""
    parent = os.getppid()
    with stop_on_signals() as stop:
        config = WorkerConfig(**json.load(sys.stdin))

        def stopping() -> bool:
            return stop.is_set() or os.getppid() != parent  # a worker does not outlive its sweep

        try:
            return work(config, say, stopping, bar=False)
        except StoryError as error:
            say(f"story: {error}")
            return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
