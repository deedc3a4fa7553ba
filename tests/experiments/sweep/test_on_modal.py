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

from experiments.sweep import on_modal, remote
from experiments.sweep.on_modal import CALL, run_calls
from experiments.sweep.parent import EXPERIMENT, begin_parent
from experiments.sweep.plan import Budget, Plan
from experiments.sweep.shown import rows
from experiments.sweep.space import load_space
from experiments.sweep.study import begin_study, open_study
from experiments.sweep.worker import FAILED, STOPPED, Order
from tests.experiments.sweep.sweeps import STEPS, small_space
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
    """Stands for `modal.FunctionCall`; `cancel` is noted, as a thread cannot be ended."""

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

    def __init__(self, root: Path, wire: Partitions, run: Callable[..., None] = remote.train) -> None:
        self.root, self.wire, self.run = root, wire, run
        self.calls: list[Thread] = []
        self.jobs: list[dict[str, Any]] = []
        self.ended_before: list[str] = []
        self.commits = 0

    def spawn(self, job: dict[str, Any]) -> Thread:
        self.jobs.append(job)
        self.calls.append(Thread(len(self.calls), lambda: self.run(job, self.wire, self.root, self.commit)))
        return self.calls[-1]

    def cancel(self, call_id: str) -> None:
        self.ended_before.append(call_id)

    def commit(self) -> None:
        self.commits += 1


class Sweep:
    """A sweep with its study and a Volume in a folder."""

    def __init__(self, folder: Path, shards: Path | None, uri: str | None = None) -> None:
        self.folder, self.wire = folder, Partitions()
        self.plan = Plan(load_space(small_space(folder)), Budget(steps=STEPS), "own", None, "modal", 3)
        storage = f"sqlite:///{folder}/sweeps.db"
        study = begin_study(storage, "m", self.plan)
        if shards is not None:
            shutil.copytree(shards, folder / "volume" / "data" / "own")
        parent = None if uri is None else begin_parent(uri, study, self.plan)
        self.order = Order(storage, "m", str(folder / "out"), "own", 0, 1, uri, parent)
        self.told: list[str] = []

    def run(
        self,
        containers: Containers,
        trials: int,
        at_once: int = 1,
        stopping: Callable[[], bool] = lambda: False,
    ) -> int:
        import dataclasses

        order = dataclasses.replace(self.order, trials=trials)
        return run_calls(order, self.plan, at_once, self.told.append, stopping, containers, self.wire)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return rows(open_study(self.order.storage, "m"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_modal, "POLL", 0.05)


def test_trials_train_elsewhere_and_are_judged_and_logged_here(
    shards: Path, tmp_path: Path, tracking_uri: str
) -> None:
    sweep = Sweep(tmp_path, shards, tracking_uri)
    containers = Containers(tmp_path / "volume", sweep.wire)
    assert sweep.run(containers, trials=1) == 0, sweep.told
    assert sweep.run(containers, trials=3, at_once=2) == 0, sweep.told
    found = sweep.rows
    assert [row["state"] for row in found] == ["complete", *(row["state"] for row in found[1:])]
    assert {row["state"] for row in found} == {"complete", "pruned"}, sweep.told
    assert sum(row["step"] < STEPS for row in found) == sum(row["state"] == "pruned" for row in found)
    assert containers.commits >= 3
    assert (tmp_path / "volume" / "sweeps" / "m" / "trial-0000" / "best" / "config.json").exists()
    client = open_store(tracking_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`sweep.trial` = '0'")
    (child,) = runs
    assert child.data.tags["mlflow.parentRunId"] == sweep.order.parent_run
    assert child.info.status == "FINISHED"
    assert len(client.get_metric_history(child.info.run_id, "train/loss")) == STEPS
    curve = [point.value for point in client.get_metric_history(child.info.run_id, "val/bits_per_byte")]
    assert min(curve) == found[0]["value"]
    digest = open_study(sweep.order.storage, "m").user_attrs["plan"]["digest"]
    assert child.data.tags["data.digest"] == digest, "which data it is comes from the first trial"


def test_a_trial_that_is_stopped_here_is_cancelled_there_and_ended_before_it_is_tried_again(
    tmp_path: Path,
) -> None:
    sweep = Sweep(tmp_path, None)
    containers = Containers(tmp_path, sweep.wire, lambda *_: None)
    assert sweep.run(containers, trials=1, stopping=lambda: bool(containers.calls)) == STOPPED
    assert containers.calls[0].cancelled
    assert [row["state"] for row in sweep.rows] == ["failed", "waiting"]

    def finishes(job: dict[str, Any], wire: Partitions, *_: Any) -> None:
        wire.put((8, 1.5), partition=f"{job['key']}.up")
        assert wire.get(timeout=60, partition=f"{job['key']}.down") is None
        wire.put(remote_end(1.5), partition=f"{job['key']}.up")

    again = Containers(tmp_path, sweep.wire, finishes)
    assert sweep.run(again, trials=1) == 0
    assert again.ended_before == ["fc-0"]
    assert (
        [job["folder"] for job in again.jobs] == ["trial-0000"] == [job["folder"] for job in containers.jobs]
    )
    assert again.jobs[0]["recipe"] == containers.jobs[0]["recipe"]
    assert open_study(sweep.order.storage, "m").trials[1].user_attrs[CALL] == "fc-0"
    assert sweep.rows[1]["value"] == 1.5


def remote_end(bits: float) -> Any:
    from experiments.sweep.trial import Ended

    return Ended("finished", "the budget is used", bits, STEPS, 100)


def test_a_container_that_ends_without_a_word_or_lacks_its_data_is_a_failure_with_a_reason(
    tmp_path: Path,
) -> None:
    sweep = Sweep(tmp_path, None)
    assert sweep.run(Containers(tmp_path, sweep.wire, lambda *_: None), trials=1) == FAILED
    assert sweep.rows[0]["reason"] == "its container ended without a word"
    assert sweep.run(Containers(tmp_path, sweep.wire), trials=1) == FAILED
    assert (
        "the Volume holds no shards own; `modal run -m deploy.modal_app::prepare`" in sweep.rows[-1]["reason"]
    )


def test_a_run_whose_sweep_is_gone_saves_and_stops(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.1)
    shutil.copytree(shards, tmp_path / "data" / "own")
    plan = Plan(load_space(small_space(tmp_path)), Budget(steps=STEPS), "own", None, "modal", 3)
    wire, commits = Partitions(), []
    job = {
        "key": "k",
        "recipe": plan.recipe({}).as_dict(),
        "data": "own",
        "sweep": "m",
        "folder": "trial-0000",
    }
    remote.train(job, wire, tmp_path, lambda: commits.append(1))
    *_, ended = wire.queues["k.up"].queue
    assert (ended.how, ended.reason) == ("stopped", "the sweep does not answer any more")
    assert ended.step < STEPS
    assert (tmp_path / "sweeps" / "m" / "trial-0000" / "last" / "trainer.pt").exists()
    assert commits
