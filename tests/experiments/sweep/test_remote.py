"""Trials on Modal, with both ends of the wire and a real training between them.

What is pretended is Modal itself, which is not in a test: a call runs in a thread instead of a container, and its Queue
is made of Python's own. `tests/deploy/test_modal_app.py` shows what Modal would be asked for.
"""

from __future__ import annotations

import queue
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.sweep import remote
from experiments.sweep.plan import Budget, Plan, load_space
from experiments.sweep.remote import CALL, call_runner
from experiments.sweep.run import FAILED, STOPPED, SweepOptions, begin_run, run_trials, trial_log
from experiments.sweep.study import EXPERIMENT, begin_study, open_study, rows
from tests.experiments.sweep.sweeps import STEPS, ended, evaluation, small_space
from training.tracking.store import open_store


class Partitions:
    """Stands for `modal.Queue`."""

    def __init__(self) -> None:
        self.queues: dict[str, queue.Queue[Any]] = defaultdict(queue.Queue)

    def put(self, v: Any, *, partition: str) -> None:
        self.queues[partition].put(v)

    def get(self, *, timeout: float, partition: str) -> Any:
        return self.queues[partition].get(timeout=timeout)


class Thread:
    """Stands for `modal.FunctionCall`; `cancel` is recorded, as a thread cannot be ended."""

    def __init__(self, number: int, run: Callable[[], None]) -> None:
        self.object_id = f"fc-{number}"
        self.cancelled = False
        self.thread = threading.Thread(target=run)
        self.thread.start()

    def get(self, timeout: float | None = None) -> Any:
        self.thread.join(timeout)
        if self.thread.is_alive():
            raise TimeoutError

    def cancel(self) -> None:
        self.cancelled = True


class Containers:
    """Stands for the deployed Function; a call does what `deploy.modal_app.sweep_trial` does."""

    def __init__(self, root: Path, wire: Partitions, run: Callable[..., None] = remote.train_remotely) -> None:
        self.root, self.wire, self.run = root, wire, run
        self.calls: list[Thread] = []
        self.jobs: list[dict[str, Any]] = []
        self.commits = 0

    def spawn(self, job: dict[str, Any], wire: Partitions) -> Thread:
        self.jobs.append(job)
        self.calls.append(Thread(len(self.calls), lambda: self.run(job, self.wire, self.root, self.commit)))
        return self.calls[-1]

    def commit(self) -> None:
        self.commits += 1


def modal_plan(folder: Path) -> Plan:
    space = load_space(small_space(folder))
    return Plan(space=space, budget=Budget(steps=STEPS), data="own", digest=None, place="modal", seed=3)


class Sweep:
    """A sweep with its study and a Volume in a folder."""

    def __init__(self, folder: Path, shards: Path | None, uri: str | None = None) -> None:
        self.folder = folder
        self.wire: Any = Partitions()
        self.plan = modal_plan(folder)
        storage = f"sqlite:///{folder}/sweeps.db"
        study = begin_study(storage, "m", self.plan)
        if shards is not None:
            shutil.copytree(shards, folder / "volume" / "data" / "own")
        self.parent = None if uri is None else begin_run(uri, study)
        self.storage, self.uri = storage, uri
        self.lines: list[str] = []

    def run(
        self, containers: Containers, trials: int, at_once: int = 1, stopping: Callable[[], bool] = lambda: False
    ) -> int:
        options = SweepOptions(name="m", storage=self.storage, trials=trials, workers=at_once, out=self.folder / "out")
        train = call_runner(containers, self.wire, "m", "own", trial_log(self.uri, self.parent, "m"))
        return run_trials(open_study(self.storage, "m"), options, train, self.lines.append, stopping)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return rows(open_study(self.storage, "m"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "POLL", 0.05)


def test_trials_train_elsewhere_and_are_judged_and_logged_here(shards: Path, tmp_path: Path, tracking_uri: str) -> None:
    sweep = Sweep(tmp_path, shards, tracking_uri)
    containers = Containers(tmp_path / "volume", sweep.wire)
    assert sweep.run(containers, trials=1) == 0, sweep.lines
    assert sweep.run(containers, trials=3, at_once=2) == 0, sweep.lines
    found = sweep.rows
    assert [row["state"] for row in found] == ["complete", *(row["state"] for row in found[1:])]
    assert {row["state"] for row in found} == {"complete", "pruned"}, sweep.lines
    assert sum(row["step"] < STEPS for row in found) == sum(row["state"] == "pruned" for row in found)
    assert containers.commits >= 3
    assert (tmp_path / "volume" / "sweeps" / "m" / "trial-0000" / "best" / "config.json").exists()
    client = open_store(tracking_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`sweep.trial` = '0'")
    (child,) = runs
    assert child.data.tags["mlflow.parentRunId"] == sweep.parent
    assert child.info.status == "FINISHED"
    assert len(client.get_metric_history(child.info.run_id, "train/loss")) == STEPS
    curve = [point.value for point in client.get_metric_history(child.info.run_id, "val/bits_per_byte")]
    assert min(curve) == found[0]["value"]
    digest = open_study(sweep.storage, "m").user_attrs["plan"]["digest"]
    assert child.data.tags["data.digest"] == digest, "which data it is comes from the first trial"


def test_a_stopped_trial_is_cancelled_remotely_and_again_before_it_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(tmp_path, None)
    containers = Containers(tmp_path, sweep.wire, lambda *_: None)
    assert sweep.run(containers, trials=1, stopping=lambda: bool(containers.calls)) == STOPPED
    assert containers.calls[0].cancelled
    assert [row["state"] for row in sweep.rows] == ["failed", "waiting"]

    def finishes(job: dict[str, Any], wire: Partitions, *_: Any) -> None:
        wire.put(evaluation(STEPS, 1.5), partition=f"{job['key']}.up")
        assert wire.get(timeout=60, partition=f"{job['key']}.down") is None
        wire.put(ended("finished", "the budget is used", 1.5), partition=f"{job['key']}.up")
        wire.put(None, partition=f"{job['key']}.up")

    cancelled: list[str] = []
    monkeypatch.setattr(remote, "cancel_call", cancelled.append)
    again = Containers(tmp_path, sweep.wire, finishes)
    assert sweep.run(again, trials=1) == 0
    assert cancelled == ["fc-0"]
    assert [job["out"] for job in again.jobs] == ["sweeps/m/trial-0000"] == [job["out"] for job in containers.jobs]
    assert again.jobs[0]["recipe"] == containers.jobs[0]["recipe"]
    assert open_study(sweep.storage, "m").trials[1].user_attrs[CALL] == "fc-0"
    assert sweep.rows[1]["value"] == 1.5


def test_a_container_that_ends_without_a_word_or_lacks_its_data_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, None)
    assert sweep.run(Containers(tmp_path, sweep.wire, lambda *_: None), trials=1) == FAILED
    assert sweep.rows[0]["reason"] == "its container ended without a result"
    assert sweep.run(Containers(tmp_path, sweep.wire), trials=1) == FAILED
    assert "the Volume holds no shards own; `modal run -m deploy.modal_app::prepare`" in sweep.rows[-1]["reason"]


def test_a_run_whose_sweep_is_gone_saves_and_stops(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "REPLY_TIMEOUT", 0.1)
    shutil.copytree(shards, tmp_path / "data" / "own")
    plan = modal_plan(tmp_path)
    wire: Any = Partitions()
    commits: list[int] = []
    job = {"key": "k", "recipe": plan.recipe({}).as_dict(), "data": "data/own", "out": "sweeps/m/trial-0000"}
    remote.train_remotely(job, wire, tmp_path, lambda: commits.append(1))
    *_, end, error = wire.queues["k.up"].queue
    assert (end.outcome, end.reason, error) == ("stopped", "the sweep no longer answers", None)
    assert end.step < STEPS
    assert (tmp_path / "sweeps" / "m" / "trial-0000" / "last" / "trainer.pt").exists()
    assert commits
